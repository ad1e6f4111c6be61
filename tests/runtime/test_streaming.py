"""Streamed blocks: what the resident model computes, bit for bit, however late the device copies and computes."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import cogx_fast
from cogx_fast.attention.plan_file import choose_plan
from cogx_fast.runtime.compiling.compile import CompileConfig, compile_model, watch_compilation
from cogx_fast.runtime.distributed.parallel import ParallelConfig
from cogx_fast.runtime.module import CogVideoXModel
from cogx_fast.runtime.runner import Runner, Slots, compute_all
from cogx_fast.runtime.streaming import InOrder, OffloadError, StreamedBlocks, stream_blocks
from tests.cases import for_each
from tests.pipes import FRAMES, HEIGHT, WIDTH, make_pipe
from tests.support import AROUND, RELEASED, inputs, relative_error, small

LAYERS = 5
CPU = torch.device("cpu")


def make(name: str = "5b", **options: Any) -> CogVideoXModel:
    torch.manual_seed(0)
    model = CogVideoXModel(small(name, num_layers=LAYERS, **options)).eval()
    for parameter in model.parameters():  # norms and biases away from their trivial start
        parameter.data.add_(torch.randn_like(parameter) * 0.02)
    return model


def run(model: Any, **options: Any) -> Tensor:
    with torch.no_grad():
        sample: Tensor = model(**inputs(model.config, **{"dtype": model.dtype, **options})).sample
        return sample


# ------------------------------------------------------------------------------- a device that is late, and early


class Late:
    """A device that is not there: it computes and copies when the test says, in any order that events allow.

    What a block computes and what is copied are two queues of work, each done in order. A moment is a place in one.
    """

    def __init__(self, *, copies_first: bool) -> None:
        self.copies_first = copies_first
        self.queues: dict[str, deque[Any]] = {"compute": deque(), "copy": deque()}
        self.asked = {"compute": 0, "copy": 0}
        self.done = {"compute": 0, "copy": 0}

    def ask(self, queue: str, work: Callable[[], object], after: tuple[str, int] | None = None) -> tuple[str, int]:
        self.queues[queue].append((work, after))
        self.asked[queue] += 1
        return queue, self.asked[queue]

    def drain(self) -> None:
        order = ("copy", "compute") if self.copies_first else ("compute", "copy")
        while any(self.queues.values()):
            ready = [
                name
                for name in order
                if self.queues[name] and ((after := self.queues[name][0][1]) is None or self.done[after[0]] >= after[1])
            ]
            self.queues[ready[0]].popleft()[0]()  # an IndexError is a deadlock
            self.done[ready[0]] += 1

    # -- runtime.streaming.Copies

    def mark(self) -> Any:
        return "compute", self.asked["compute"]

    def copy(self, source: Tensor, target: Tensor, after: Any) -> Any:
        return self.ask("copy", lambda: target.copy_(source), after)

    def wait(self, moment: Any) -> None:
        self.ask("compute", lambda: None, moment)

    # -- slots of the runner

    def call_block(self, layer: int, block: Any) -> Callable[..., Tensor]:
        weights = dict(block.named_parameters()) | dict(block.named_buffers())

        def call(x_BSD: Tensor, *rest: Any) -> Tensor:
            out_BSD = torch.empty_like(x_BSD)
            compute = torch.func.functional_call
            self.ask("compute", lambda: out_BSD.copy_(compute(block, weights, (x_BSD, *rest))))
            return out_BSD

        return call

    def reuse(self, *arguments: Any) -> Tensor:
        x_BSD = compute_all(*arguments)
        self.drain()
        return x_BSD


class WithoutWait(Late):
    """A block computes whether or not its weights are there."""

    def wait(self, moment: Any) -> None:
        pass


class EarlyReuse(Late):
    """A slot is written to whether or not the block in it has computed."""

    def copy(self, source: Tensor, target: Tensor, after: Any) -> Any:
        return super().copy(source, target, None)


def streamed_on(device: Late, name: str = "5b") -> list[Tensor]:
    """What two steps compute there, of which the second finds the slots used."""
    model = make(name)
    slots = Slots(residency=StreamedBlocks(lambda _: device), call_block=device.call_block, reuse=device.reuse)
    model.runner = Runner(slots)
    return [run(model), run(model, seed=2)]


@pytest.mark.parametrize("copies_first", [True, False])
def test_copies_and_blocks_may_be_early_or_late(copies_first: bool) -> None:
    resident = make()
    expected = [run(resident), run(resident, seed=2)]
    for found, want in zip(streamed_on(Late(copies_first=copies_first)), expected, strict=True):
        assert torch.equal(found, want)


def test_planted_races_show() -> None:
    expected = run(make(), seed=2)
    for broken in (WithoutWait(copies_first=False), EarlyReuse(copies_first=True)):
        assert not torch.equal(streamed_on(broken)[1], expected), type(broken).__name__
        innocent = type(broken)(copies_first=not broken.copies_first)
        assert torch.equal(streamed_on(innocent)[1], expected), "the fault shows in one order alone"


def test_a_copy_is_under_way_while_a_block_computes_and_only_two_blocks_are_there() -> None:
    device = Late(copies_first=True)
    seen = []
    ask = device.ask

    def told(queue: str, work: Callable[[], object], after: Any = None) -> Any:
        seen.append(queue if queue == "copy" or after is None else "wait")
        return ask(queue, work, after)

    device.ask = told  # type: ignore[method-assign]
    streamed_on(device)
    step = seen[: len(seen) // 2]
    assert step == ["copy", "copy", *["wait", "compute", "copy"] * (LAYERS - 2), *["wait", "compute"] * 2]


# -------------------------------------------------------------------------------------------------- the whole model


@for_each("name", RELEASED)
def test_every_release_computes_the_same_bit_for_bit(name: str) -> None:
    model = make(name)
    expected = [run(model, batch=batch) for batch in (2, 1)]
    stream_blocks(model, CPU)
    for batch, want in zip((2, 1), expected, strict=True):
        assert torch.equal(run(model, batch=batch), want)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("streamed")
    make(num_attention_heads=4).bfloat16().save_pretrained(folder)
    return folder


def adapter(folder: Any, config: Any) -> str:
    from safetensors.torch import save_file

    width = config.inner_dim
    name = "transformer.transformer_blocks.{}.attn1.to_q.lora_{}.weight"
    tensors = {
        name.format(layer, half): torch.randn(4, width) if half == "A" else torch.randn(width, 4)
        for layer in range(LAYERS)
        for half in "AB"
    }
    save_file(tensors, folder / "adapter.safetensors")
    return str(folder / "adapter.safetensors")


def test_it_goes_with_recipes_loras_plans_and_step_caches(checkpoint: Any, tmp_path: Any) -> None:
    config = small("5b", num_layers=LAYERS, num_attention_heads=4)
    recipes = ("int8-weight-only", "int8-dynamic", "fp8-weight-only")
    combinations: list[dict[str, Any]] = [
        *({"quant": recipe} for recipe in recipes),
        {"attention_plan": choose_plan("radial", config)},
        {"loras": [cogx_fast.Lora(adapter(tmp_path, config), alpha=4)], "quant": "int8-weight-only"},
    ]
    for options in combinations:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "recipe .* quantizes activations")
            resident = cogx_fast.load(checkpoint, **options)
            streamed = cogx_fast.load(checkpoint, offload="blocks", device="cpu", **options)
        assert torch.equal(run(streamed), run(resident)), options
    schedule = torch.linspace(999, 1, 6).round().long()
    resident, streamed = (cogx_fast.load(checkpoint, step_cache="fast", offload=how) for how in (None, "blocks"))
    for step in schedule:
        timestep = step.expand(2)
        given = inputs(config, dtype=torch.bfloat16) | {"timestep": timestep}
        with torch.no_grad():
            assert torch.equal(streamed(**given).sample, resident(**given).sample)


@pytest.mark.parametrize(("recipe", "backend"), [(None, "inductor"), ("int8-weight-only", "eager")])
def test_compiled_it_is_one_graph_that_never_compiles_again(checkpoint: Any, recipe: str | None, backend: str) -> None:
    config = CompileConfig(strict=True, backend=backend)
    resident = cogx_fast.load(checkpoint, quant=recipe, compile=config)
    streamed = cogx_fast.load(checkpoint, quant=recipe, compile=config, offload="blocks")
    sizes: list[dict[str, Any]] = [{}, {"batch": 1}, {"frames": 3}]
    expected = [run(resident, **size) for size in sizes]
    with watch_compilation() as stats:
        found = [run(streamed, **size) for size in sizes]
    assert (stats.graphs, stats.breaks, stats.recompiles) == (1 + AROUND, 0, 0)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_layers_that_are_quantized_in_different_ways_share_the_slots(checkpoint: Any, tmp_path: Any) -> None:
    recipe = tmp_path / "mixed.toml"
    recipe.write_text(
        'name = "mixed"\ndescription = "two kinds of blocks"\n'
        '[[rule]]\nmatch = ["transformer_blocks.1.ff.net.*", "transformer_blocks.1.ff.net.0.proj"]\n'
        'scheme = "int8-weight-only"\n'
        '[[rule]]\nmatch = "transformer_blocks.3.attn1.to_qkv"\nscheme = "fp8-weight-only"\n'
    )
    resident, streamed = (cogx_fast.load(checkpoint, quant=recipe, offload=how) for how in (None, "blocks"))
    assert torch.equal(run(streamed), run(resident))


def test_hooks_on_a_block_see_every_call() -> None:
    model = make()
    stream_blocks(model, CPU)
    seen: list[int] = []
    for layer, block in enumerate(model.transformer_blocks):
        block.register_forward_hook(lambda *_, layer=layer: seen.append(layer))
    run(model)
    assert seen == list(range(LAYERS))


# ------------------------------------------------------------------------------------------------------ the weights


def test_what_is_changed_in_the_weights_holds_from_the_next_step_on() -> None:
    model, resident = make(), make()
    stream_blocks(model, CPU)
    run(model)
    other = {name: tensor + 0.01 for name, tensor in resident.state_dict().items()}
    for changed in (model, resident):
        changed.load_state_dict(other)
    assert torch.equal(run(model), run(resident))
    for changed in (model, resident):
        changed.load_state_dict({name: tensor * 1.1 for name, tensor in other.items()}, assign=True)
        changed.transformer_blocks[0].ff.net[2].bias.data.mul_(2)  # which no version counter sees
    assert torch.equal(run(model), run(resident))


def test_loras_are_exchanged_in_place(checkpoint: Any, tmp_path: Any) -> None:
    config = small("5b", num_layers=LAYERS, num_attention_heads=4)
    lora = cogx_fast.Lora(adapter(tmp_path, config), alpha=4)
    for recipe in (None, "int8-weight-only"):
        resident = cogx_fast.load(checkpoint, quant=recipe)
        streamed = cogx_fast.load(checkpoint, quant=recipe, offload="blocks", schedule=True)
        for loras in ([lora], [], [lora]):
            for model in (resident, streamed):
                model.set_loras(loras)
            streamed.to("cpu")
            assert relative_error(run(streamed), run(resident)) <= 2**-7


def test_a_block_is_one_run_of_bytes_and_its_weights_are_views_of_them() -> None:
    model = make()
    stream_blocks(model, CPU)
    for block in model.transformer_blocks:
        memory = {tensor.untyped_storage().data_ptr() for tensor in block.parameters()}
        assert len(memory) == 1
        held = sum(tensor.nbytes for tensor in block.parameters())
        assert held <= next(block.parameters()).untyped_storage().nbytes() <= held + 256 * 20


def test_an_error_in_a_block_leaves_the_weights_on_the_host_and_the_next_step_right() -> None:
    model = make()
    expected = run(model)
    stream_blocks(model, CPU)
    before = [id(tensor) for tensor in model.parameters()]

    def fail(*_: Any) -> None:
        raise RuntimeError("planted")

    hook = model.transformer_blocks[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="planted"):
        run(model)
    assert [id(tensor) for tensor in model.parameters()] == before
    hook.remove()
    assert torch.equal(run(model), expected)


def test_it_is_saved_copied_pickled_and_taken_like_any_model(tmp_path: Any) -> None:
    model = make()
    expected = run(model)
    stream_blocks(model, CPU)
    model.save_pretrained(tmp_path)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), cogx_fast.load(tmp_path)):  # noqa: S301
        assert torch.equal(run(other), expected)
    assert torch.equal(run(cogx_fast.load(model)), expected)


def test_moving_the_model_leaves_its_blocks_and_another_dtype_is_refused() -> None:
    model = make()
    stream_blocks(model, CPU)
    before = list(model.transformer_blocks.parameters())
    model.to("meta")
    assert model.device.type == "meta"
    assert all(one is other for one, other in zip(model.transformer_blocks.parameters(), before, strict=True))
    with pytest.raises(OffloadError, match=r"keep their dtype .*dtype="):
        model.to(torch.bfloat16)


# ------------------------------------------------------------------------------------------------ what is refused


def test_what_does_not_go_with_it_is_refused_before_anything_is_loaded() -> None:
    refused: dict[str, dict[str, Any]] = {
        "expected 'blocks'": {"offload": "disk"},
        "CUDA graphs": {"offload": "blocks", "compile": CompileConfig(scope="model", mode="reduce-overhead")},
        "scope='model'": {"offload": "blocks", "compile": CompileConfig(scope="model")},
        "parallel": {"offload": "blocks", "parallel": ParallelConfig(guidance=2)},
    }
    for word, options in refused.items():
        with pytest.raises(OffloadError, match=word):
            cogx_fast.load("/nothing/is/there", **options)
    model = make()
    stream_blocks(model, CPU)
    with pytest.raises(OffloadError, match="parallel"):
        model.set_parallel(ParallelConfig(guidance=2))
    with pytest.raises(OffloadError, match="no_grad"):
        model(**inputs(model.config))
    with pytest.raises(ValueError, match="offload='blocks'"):
        compile_model(model, CompileConfig(scope="model", backend="eager"))
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"OffloadError.*load\(\.\.\., compile=True\)"):
        torch.compile(model, backend="eager", fullgraph=True)(**inputs(model.config))


def test_accelerated_pipelines_make_the_same_video_and_other_offload_is_refused() -> None:
    def video(**options: Any) -> Tensor:
        pipe = cogx_fast.accelerate(make_pipe("CogVideoXPipeline", "5b"), **options)
        result: Tensor = pipe(
            "a panda", height=HEIGHT, width=WIDTH, num_frames=FRAMES, num_inference_steps=2, max_sequence_length=8,
            output_type="latent", generator=torch.Generator().manual_seed(0),
        ).frames  # fmt: skip
        return result

    assert torch.equal(video(offload="blocks"), video())
    from accelerate import cpu_offload

    pipe = make_pipe("CogVideoXPipeline", "5b")
    cpu_offload(pipe.transformer, CPU)
    with pytest.raises(ValueError, match="layer by layer"):
        cogx_fast.accelerate(pipe, offload="blocks")
    model = make()
    stream_blocks(model, CPU)
    cpu_offload(model, CPU)
    with pytest.raises(OffloadError, match="has no weights"):
        run(model)


def test_in_order_is_what_the_protocol_says() -> None:
    source, target = torch.arange(4), torch.zeros(4, dtype=torch.long)
    copies = InOrder()
    copies.wait(copies.copy(source, target, copies.mark()))
    assert torch.equal(source, target)


def test_two_threads_take_turns() -> None:
    model = make()
    expected = [run(model, seed=seed) for seed in range(4)]
    stream_blocks(model, CPU)
    found: dict[int, Tensor] = {}
    threads = [
        threading.Thread(target=lambda seed=seed: found.update({seed: run(model, seed=seed)})) for seed in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[seed], expected[seed]) for seed in range(4))
