"""What the compiler sees is one graph: nothing breaks it, nothing is read back from the device, nothing is in place.

Not compiled, the model writes over what it has just made, and over nothing else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cogx_fast.runtime.runner import Inputs, Runner, Slots, run
from tests.cases import for_each
from tests.model.pairs import TOLERANCE, call, copy_of, pair
from tests.support import RELEASED, inputs, relative_error


class Captured:
    """A torch.compile backend that keeps the graphs it is given and runs them as they are; it begins with none."""

    def __init__(self) -> None:
        torch._dynamo.reset()
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: Any) -> Any:
        self.graphs.append(graph)
        return graph.forward

    def operations(self) -> Counter[str]:
        """How often each function or method is called, also in graphs within the graph."""
        nodes = [
            node for graph in self.graphs for module in graph.modules() for node in getattr(module, "graph", ()).nodes
        ]
        called = [node for node in nodes if node.op in ("call_function", "call_method")]
        return Counter(getattr(node.target, "__name__", str(node.target)) for node in called)


class Operations(TorchDispatchMode):
    """Records every ATen operation that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


@pytest.fixture(autouse=True, scope="module")
def nothing_is_left() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def core_call(name: str, backend: str = "sdpa") -> tuple[Any, Inputs]:
    """A model and what its outer forward hands to the loop over its blocks."""
    both = pair(name)
    model = copy_of(both.theirs, both.config, attention=backend)
    handed: list[Inputs] = []

    class Recording(Runner):
        def __call__(self, model: Any, inputs: Inputs) -> Tensor:
            handed.append(inputs)
            return super().__call__(model, inputs)

    with torch.no_grad(), mock.patch.object(model, "runner", Recording()):
        model(**inputs(both.config))
    return model, handed[0]


@for_each("name", RELEASED)
def test_traced_forward_is_one_graph_with_one_attention_a_layer_and_nothing_in_place(name: str) -> None:
    model, handed = core_call(name)
    captured = Captured()
    compiled = torch.compile(run, fullgraph=True, backend=captured)
    with torch.no_grad():
        expected = run(model, Slots(), handed)
        assert relative_error(compiled(model, Slots(), handed), expected) <= TOLERANCE
        compiled(model, Slots(), handed._replace(timestep_B=torch.tensor([3, 4])))
    assert len(captured.graphs) == 1

    operations, layers, ofs = captured.operations(), model.config.num_layers, model.config.ofs_embed_dim is not None
    assert operations["scaled_dot_product_attention"] == layers
    assert operations["cat"] == 2 + ofs  # text and video, once; cosines and sines of the timestep
    # a linear for each: patch, text, time 2, modulation, output norm, output; query-key-value, output, feed-forward 2
    assert operations["linear"] == 7 + 4 * layers + 2 * ofs
    assert operations["item"] == operations["contiguous"] == operations["clone"] == operations["setitem"] == 0
    assert [name for name in operations if name.endswith("_") and not name.endswith("__")] == []


@pytest.mark.parametrize("name", ["2b", "5b"])
def test_traced_forward_with_checkpointing_is_one_graph(name: str) -> None:
    model, handed = core_call(name)
    model.enable_gradient_checkpointing()
    captured = Captured()
    compiled = torch.compile(run, fullgraph=True, backend=captured)
    compiled(model, Slots(), handed).square().sum().backward()
    assert len(captured.graphs) == 1
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    run(model, Slots(), handed).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert relative_error(found[name], parameter.grad) <= TOLERANCE or name.endswith("norm_k.bias"), name


@for_each("training", [False, True], "name", RELEASED)
def test_eager_call_reads_nothing_back_and_writes_over_nothing_that_it_was_given(name: str, training: bool) -> None:
    model = copy_of(pair(name).theirs, pair(name).config).train(training)
    arguments = call(model.config)
    given = [*model.state_dict(keep_vars=True).values(), *tree_leaves(arguments)]
    with torch.set_grad_enabled(training):
        model(**arguments)  # tables are made here
        versions = [tensor._version for tensor in given if isinstance(tensor, Tensor)]
        with Operations() as operations:
            model(**arguments)
    assert torch.ops.aten._local_scalar_dense.default not in operations.seen
    assert [tensor._version for tensor in given if isinstance(tensor, Tensor)] == versions
    assert torch.ops.aten.addmm.default in operations.seen  # the record is not empty


@for_each("name", RELEASED)
def test_callers_own_compile_of_the_whole_module_is_one_graph(name: str) -> None:
    both = pair(name)
    model = copy_of(both.theirs, both.config)
    arguments = call(both.config)
    tables = arguments.pop("image_rotary_emb")
    captured = Captured()
    compiled = torch.compile(model, fullgraph=True, backend=captured)
    with torch.no_grad():
        expected = both.theirs(**arguments, image_rotary_emb=tables).sample
        for given in (tables, None):
            output = compiled(**arguments, image_rotary_emb=given, return_dict=False)[0]
            assert relative_error(output, expected) <= TOLERANCE
        graphs = len(captured.graphs)
        assert graphs == (1 if tables is None else 2)  # with tables and without
        for timestep in (7, 900):
            again = arguments | {"timestep": torch.tensor([timestep, timestep])}
            output = compiled(**again, image_rotary_emb=None, return_dict=False)[0]
            assert relative_error(output, both.theirs(**again, image_rotary_emb=tables).sample) <= TOLERANCE
        eager = model(**arguments).sample  # holds tables now, which must not invalidate the graph
        assert relative_error(eager, expected) <= TOLERANCE
        compiled(**arguments, image_rotary_emb=None, return_dict=False)
    assert len(captured.graphs) == graphs
    assert captured.operations()["item"] == 0


@pytest.mark.parametrize("name", ["2b", "5b"])
def test_callers_own_compile_follows_changing_sizes(name: str) -> None:
    both = pair(name)
    compiled = torch.compile(copy_of(both.theirs, both.config), fullgraph=True, backend=Captured())
    for size in [{}, {"height": 6}, {"width": 8, "frames": 2, "batch": 1}]:
        arguments = inputs(both.config, **size)
        with torch.no_grad():
            output = compiled(**arguments, return_dict=False)[0]
            assert relative_error(output, both.ours(**arguments).sample) <= TOLERANCE


def test_callers_own_compile_trains() -> None:
    both = pair("5b")
    model, reference = copy_of(both.theirs, both.config), copy_of(both.theirs, both.config)
    compiled = torch.compile(model, fullgraph=True, backend=Captured())
    arguments = inputs(both.config)
    for model_ in (compiled, reference):
        model_(**arguments, return_dict=False)[0].square().sum().backward()
    for (name, ours), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert relative_error(ours.grad, expected.grad) <= TOLERANCE, name


def test_flex_is_one_graph_with_the_mask_as_an_input() -> None:
    model, handed = core_call("5b", backend="flex")
    assert handed.mask is not None
    captured = Captured()
    with torch.no_grad():
        torch.compile(run, fullgraph=True, backend=captured)(model, Slots(), handed)
    assert len(captured.graphs) == 1
    operations = captured.operations()
    assert operations["flex_attention"] == model.config.num_layers
    assert operations["scaled_dot_product_attention"] == operations["ones"] == operations["zeros"] == 0
