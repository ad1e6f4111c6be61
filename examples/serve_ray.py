"""Serve videos over HTTP with Ray Serve: a replica for each GPU, a queue in front of them.

    pip install 'cogx-fast[serve,pipelines,video]'
    python examples/serve_ray.py --model THUDM/CogVideoX-5b --dtype bf16 --compile
    curl localhost:8000/videos -H 'X-Request-Id: panda' -d '{"prompt": "A panda plays the guitar"}' -o panda.mp4
    curl localhost:8000/progress/panda

Without arguments it serves the tiny pipeline that comes with the package. docs/serving.md says what each answer means.
"""

import argparse
import asyncio
import contextlib
import signal
import tempfile
import threading
import time
import uuid
from collections import OrderedDict
from pathlib import Path

import ray
import torch
from fastapi import FastAPI, HTTPException, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError

from cogx_fast.pipelines import generation
from cogx_fast.pipelines.locate import locate_pipeline
from cogx_fast.sizes import choose_video
from cogx_fast.video.files import write_video

ATTEMPTS = 4
"""Of one request, where replicas die under it: the same seed makes the same video."""
REMEMBERED = 1000
"""Requests whose progress can be asked for."""
http = FastAPI(title="CogVideoX")


class Video(BaseModel):
    """What a client asks for."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(min_length=1, max_length=4000)
    negative_prompt: str = Field(default="", max_length=4000)
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    steps: int = Field(default=50, ge=1, le=200)
    guidance: float = Field(default=6.0, ge=0, le=50)
    seed: int = Field(default=0, ge=0, lt=2**63)


class Cancelled(Exception):
    """Nobody waits for the video any more."""


@serve.deployment(max_ongoing_requests=1, health_check_period_s=2, health_check_timeout_s=30)
class Maker:
    """One pipeline, which makes one video after the other."""

    def __init__(self, model: str, dtype: str | None, compiled: bool) -> None:
        """Open the pipeline, and make a video that nobody sees, so that the first request finds it compiled."""
        self._model = locate_pipeline(model)
        device = generation.choose_device(None)
        setting = generation.Setting(compile=compiled, dtype=None if dtype is None else generation.DTYPES[dtype])
        self._pipe = generation.open_pipeline(self._model, setting, device=device)
        self._broken: str | None = None
        self._one = threading.Lock()
        size = choose_video(self._model.config, spatial_factor=self._model.spatial_factor)
        if compiled:
            generation.run_pipeline(self._pipe, generation.Request(prompt="", size=size, steps=1), decode=False)

    def check_health(self) -> None:
        """Ray asks every few seconds, and starts another replica in the place of one that raises."""
        if self._broken is not None:
            raise RuntimeError(self._broken)

    async def make(self, asked: dict):
        """The number of steps done after each one, then the file; ends within a step when it is cancelled."""
        loop, news, is_cancelled = asyncio.get_running_loop(), asyncio.Queue(), threading.Event()

        def on_step(done: int) -> None:
            if is_cancelled.is_set():
                raise Cancelled
            loop.call_soon_threadsafe(news.put_nowait, done)

        work = asyncio.ensure_future(asyncio.to_thread(self._run, asked, on_step))
        work.add_done_callback(lambda _: news.put_nowait(None))
        try:
            while (done := await news.get()) is not None:
                yield done
            yield work.result()
        finally:
            is_cancelled.set()
            with contextlib.suppress(Cancelled):
                await asyncio.shield(work)

    def _run(self, asked: dict, on_step) -> bytes:
        size = choose_video(
            self._model.config, spatial_factor=self._model.spatial_factor,
            frames=asked.pop("frames"), height=asked.pop("height"), width=asked.pop("width"),
        )  # fmt: skip
        try:
            with self._one:  # Ray may hand over the next request before a cancelled one has ended its step
                run = generation.run_pipeline(self._pipe, generation.Request(size=size, **asked), on_step=on_step)
        except Cancelled:
            raise
        except Exception as error:
            self._broken = f"{type(error).__name__}: {error}"
            raise
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory, "video.mp4")
            write_video(path, run.frames, fps=8 if self._model.config.patch_size_t is None else 16)
            return path.read_bytes()


@serve.deployment(max_ongoing_requests=1000)
@serve.ingress(http)
class Door:
    """Checks what is asked for, keeps the queue, and sees every accepted request to its end."""

    def __init__(self, makers, model: str, waiting: int, seconds: float) -> None:
        """``waiting``: requests at once, those that are being made with them; ``seconds``: for one of them."""
        from transformers import AutoTokenizer

        self._makers = makers.options(stream=True)
        self._model, self._most, self._seconds = locate_pipeline(model), waiting, seconds
        self._tokenizer = AutoTokenizer.from_pretrained(Path(self._model.location, "tokenizer"))
        self._accepted = 0
        self._progress: OrderedDict[str, dict] = OrderedDict()

    @http.post("/videos")
    async def make(self, asked: Video, request: Request) -> Response:
        """The video as an mp4."""
        self._check(asked)
        if self._accepted >= self._most:
            raise HTTPException(429, f"{self._accepted} videos wait already", {"Retry-After": "10"})
        name = request.headers.get("x-request-id") or uuid.uuid4().hex
        progress = self._progress[name] = {"state": "waiting", "step": 0, "steps": asked.steps}
        while len(self._progress) > REMEMBERED:
            self._progress.popitem(last=False)
        self._accepted += 1
        began = time.monotonic()
        try:
            content = await asyncio.wait_for(self._attempts(asked, progress), self._seconds)
        except asyncio.TimeoutError:
            progress["state"] = "failed"
            raise HTTPException(504, f"not made within {self._seconds:.0f} s") from None
        except asyncio.CancelledError:  # the client is gone
            progress["state"] = "cancelled"
            raise
        except Exception as error:
            progress["state"] = "failed"
            raise HTTPException(500, f"{type(error).__name__}: {error}"[:500]) from error
        finally:
            self._accepted -= 1
        progress["state"] = "done"
        headers = {"X-Request-Id": name, "X-Seconds": f"{time.monotonic() - began:.2f}"}
        return Response(content, media_type="video/mp4", headers=headers)

    async def _attempts(self, asked: Video, progress: dict) -> bytes:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return await self._attempt(asked, progress)
            except (RayActorError, DeploymentUnavailableError):  # the replica died: another makes the same video
                if attempt == ATTEMPTS:
                    raise
                progress |= {"state": "waiting", "step": 0}
                await asyncio.sleep(attempt)
        raise AssertionError

    async def _attempt(self, asked: Video, progress: dict) -> bytes:
        answers = self._makers.make.remote(asked.model_dump())
        try:
            async for answer in answers:
                if isinstance(answer, bytes):
                    return answer
                progress |= {"state": "denoising", "step": answer}
        except asyncio.CancelledError:
            answers.cancel()
            raise
        raise RuntimeError("the replica ended without a video")

    def _check(self, asked: Video) -> None:
        config, factor = self._model.config, self._model.spatial_factor
        sizes = {"frames": asked.frames, "height": asked.height, "width": asked.width}
        try:
            choose_video(config, spatial_factor=factor, **sizes)
        except ValueError as error:
            raise HTTPException(422, str(error)) from None
        for name in ("prompt", "negative_prompt"):
            tokens = len(self._tokenizer(getattr(asked, name)).input_ids)
            if tokens > config.max_text_seq_length:
                raise HTTPException(422, f"{name} has {tokens} tokens, the model reads {config.max_text_seq_length}")

    @http.get("/progress/{name}")
    async def progress(self, name: str) -> dict:
        """How far a request is: waiting, denoising (step of steps), done, cancelled or failed."""
        if name not in self._progress:
            raise HTTPException(404, f"no request {name!r} is known")
        return self._progress[name]

    @http.get("/health")
    async def health(self) -> dict:
        """Replicas that can make videos; 503 where there is none."""
        status = await asyncio.to_thread(serve.status)
        states = status.applications["videos"].deployments["Maker"].replica_states
        ready = int(states.get("RUNNING", 0))
        if not ready:
            raise HTTPException(503, f"no replica is ready: {dict(states)}")
        return {"replicas": ready, "waiting": self._accepted}


if __name__ == "__main__":
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--model", default="tiny")
    arguments.add_argument("--dtype", choices=list(generation.DTYPES))
    arguments.add_argument("--compile", action="store_true")
    arguments.add_argument("--replicas", type=int, default=max(1, torch.cuda.device_count()), help="one for each GPU")
    arguments.add_argument("--waiting", type=int, default=16, help="requests at once; further ones are answered 429")
    arguments.add_argument("--seconds", type=float, default=1800, help="for one request, the time it waits with it")
    arguments.add_argument("--port", type=int, default=8000)
    given = arguments.parse_args()

    gpus = 1 if torch.cuda.is_available() else 0
    ray.init(include_dashboard=False)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    serve.start(http_options={"host": "127.0.0.1", "port": given.port})
    placed = {"num_cpus": 0, "num_gpus": gpus}
    makers = Maker.options(num_replicas=given.replicas, ray_actor_options=placed)
    door = Door.options(ray_actor_options={"num_cpus": 0}).bind(
        makers.bind(given.model, given.dtype, given.compile), given.model, given.waiting, given.seconds
    )
    serve.run(door, name="videos", blocking=False)
    print(f"ready on port {given.port}", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print("ending", flush=True)
    finally:
        serve.shutdown()
        ray.shutdown()
