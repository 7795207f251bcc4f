"""Counts the bytes that a network moves through the device's memory, which limit a step if matrix products are fast.

They are counted on the graph of operations that PyTorch traces, forward and backward, assuming a compiler that fuses
well (`_Passes`). Nothing is computed, so the count needs no particular device.
"""

import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._decomp import get_decompositions
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

import models
from kernels import batch_statistics, product
from kernels.normalise import Normalise

aten = torch.ops.aten

# Purposes of passes over memory.
PRODUCTS, STATISTICS, POINTWISE, ADDED, POOLING, OTHER = (
    "convolutions and products",
    "statistics",
    "normalise and activate",
    "residual add",
    "pooling",
    "other",
)
BACKWARD = ", backward"

_PRODUCTS = {"convolution", "convolution_backward", "mm", "addmm", "bmm", "baddbmm"}
_VIEWS = {
    *("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "t", "permute", "transpose", "expand", "as_strided"),
    *("detach", "alias", "slice", "select", "unbind", "split", "split_with_sizes", "flatten"),
}
# Pointwise for a compiler, but not tagged so by PyTorch.
_POINTWISE = {"_to_copy", "copy", "clone", "lift_fresh_copy"}
# Operators whose values are computed where they are used.
_MADE = {
    "full",
    "full_like",
    "zeros",
    "zeros_like",
    "ones",
    "ones_like",
    "new_zeros",
    "scalar_tensor",
    "empty",
    "arange",
}
# Our operators (kernels), each a separate pass.
_OURS = {
    "product": PRODUCTS,
    "sum_product": PRODUCTS,
    "statistics": STATISTICS,
    "normalise": POINTWISE,
    "normalise_and_pool": POOLING,
    "depthwise": PRODUCTS,
    "depthwise_backward": PRODUCTS,
}
_OWN_PASSES = (PRODUCTS, POOLING, OTHER, STATISTICS, POINTWISE)
# Operators that are decomposed into reductions and pointwise operations, such as batch normalisation.
_TAKEN_APART = (
    aten.native_batch_norm,
    aten._native_batch_norm_legit,
    aten._native_batch_norm_legit_functional,
    aten._native_batch_norm_legit_no_training,
    aten._batch_norm_with_update,
    aten._batch_norm_with_update_functional,
    aten.native_batch_norm_backward,
    aten.batch_norm_backward,
    aten.native_layer_norm,
    aten.native_layer_norm_backward,
    *(aten._softmax, aten._softmax_backward_data, aten.native_dropout, aten.native_dropout_backward),
    *(aten.hardtanh, aten.hardtanh_backward, aten.hardswish, aten.hardswish_backward, aten.hardsigmoid),
    *(aten.hardsigmoid_backward, aten.silu, aten.silu_backward, aten.gelu, aten.gelu_backward, aten.elu_backward),
)


@dataclass(frozen=True)
class Traffic:
    """Bytes read and written in a step, by purpose. images: number of images in the batch."""

    by_pass: dict[str, int]
    images: int

    @property
    def bytes_per_image(self) -> float:
        return sum(self.by_pass.values()) / self.images


def traffic(
    name: str,
    *,
    backward: bool,
    batch: int,
    resolution: int,
    autocast: torch.dtype | None = torch.bfloat16,
    classes: int = 1000,
    rewritten: Callable[[nn.Module], nn.Module] = lambda network: network,
) -> Traffic:
    """Returns the bytes that a network of models.build moves from uint8 crops to logits, with batch statistics.

    backward: also back to the gradients of its weights. batch: images per batch. resolution: side of a crop in pixels.
    autocast: bfloat16, float16, or None for float32 throughout. rewritten: replaces the network by one that computes
    the same, such as models.fused_resnet.FusedResNet.
    Labels, loss and metrics are small and not counted. Raises ModelError for a name that models.build does not know.
    """
    network = models.build(name, classes).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    network = rewritten(network).train()
    normalise = Normalise(models.normalisation(name))

    def run(crops: Tensor, gradient: Tensor, weights: dict[str, Tensor], buffers: dict[str, Tensor]) -> Any:
        computing = torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None, cache_enabled=False)
        with torch.set_grad_enabled(backward), computing:
            logits = torch.func.functional_call(network, (weights, buffers), (normalise(crops),))
        return torch.autograd.grad(logits, list(weights.values()), gradient.to(logits.dtype)) if backward else logits

    crops = torch.zeros(batch, resolution, resolution, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    inputs = crops, torch.zeros(batch, classes), dict(network.named_parameters()), dict(network.named_buffers())
    trace = make_fx(
        run,
        decomposition_table=get_decompositions(_TAKEN_APART),  # type: ignore[arg-type]
        tracing_mode="fake",
        _allow_non_fake_inputs=True,  # the constants of normalisation
    )
    return Traffic(dict(_Passes(list(trace(*inputs).graph.nodes)).counted()), batch)


class _Passes:
    """Groups a graph's operations into passes over memory, as a compiler that fuses well would.

    - Products, convolutions, pooling, our own operators and unknown operators read their inputs and write their
      outputs.
    - Pointwise operations are computed in the passes that use their results, from values in memory. A result is written
      if a product needs it, or if several passes use it and reading it costs them less than reading its inputs.
    - Reductions read the values in memory that their inputs are computed from. Reductions that share one of their
      largest inputs and do not depend on each other are one pass.
    """

    def __init__(self, nodes: list[Node]):
        self._nodes = [node for node in nodes if node.op == "call_function"]
        self._kinds = {node: _kind(node) for node in nodes}
        self._outputs = {_plain(node) for node in nodes[-1].all_input_nodes}
        self._before = self._ancestors(nodes)
        self._gradient = next(node for node in nodes if node.op == "placeholder" and node.name.startswith("gradient"))
        # The values in memory that a value is computed from, for a pointwise result or a view of one; else the value.
        self._read: dict[Node, frozenset[Node]] = {}
        self._choose_written(nodes)

    def counted(self) -> Counter[str]:
        """Returns the bytes by purpose."""
        found: Counter[str] = Counter()
        for node in self._nodes:
            kind, when = self._kinds[node], BACKWARD if self._is_before(self._gradient, node) else ""
            if kind == "pointwise" and self._read[node] == {node}:
                largest, *others = sorted(map(_bytes, self._least(self._inputs(node))), reverse=True) or [0]
                # Sums of vectors of channels are updates of running statistics, not residuals.
                images = node.meta["val"].dim() > 1 and not when
                added = sum(size for size in others if 2 * size > largest) if images else 0
                found[POINTWISE + when] += largest + sum(others) - added + _bytes(node)
                found[ADDED + when] += added
            elif _is_ours(node):
                for name, size in self._of_ours(node).items():
                    found[name + when] += size
            elif kind in _OWN_PASSES:
                found[kind + when] += sum(map(_bytes, self._inputs(node))) + _bytes(node)
                if node.target is aten.convolution_backward.default:
                    found[kind + when] += self._read_again(node)
        for group in self._reductions():
            when = BACKWARD if self._is_before(self._gradient, group[0]) else ""
            read = self._least(frozenset().union(*map(self._inputs, group)))
            found[STATISTICS + when] += sum(map(_bytes, read)) + sum(map(_bytes, group))
        return +found

    def _read_again(self, node: Node) -> int:
        """Returns the bytes of the output's gradient if a second kernel reads it, for the weights' gradient, else 0."""
        gradient, wanted = node.args[0], node.args[-1]
        assert isinstance(gradient, Node)
        assert isinstance(wanted, list | tuple)
        return sum(map(_bytes, self._read[gradient])) if all(wanted[:2]) else 0

    def _of_ours(self, node: Node) -> dict[str, int]:
        """Returns the bytes of one of our operators by purpose; adding a residual counts separately."""
        name, x = _name(node), node.args[0]
        assert isinstance(x, Node)
        found = Counter({_OURS[name]: sum(map(_bytes, self._inputs(node))) + _bytes(node)})
        if name in ("normalise", "sum_product") and isinstance(node.args[2], Node):
            # The residual is read, and sum_product also writes the sum.
            added = _bytes(node.args[2]) * (2 if name == "sum_product" else 1)
            found[_OURS[name]] -= added
            found[ADDED] += added
        outputs = node.meta["val"]
        if name == "product":
            # Pixels that the stride skips are not read.
            given, taken = x.meta["val"][:, 0].numel(), outputs[0][:, 0].numel()
            found[PRODUCTS] -= _bytes(x) * (given - taken) // given
        if name in ("statistics", "product", "sum_product"):
            counted = x.meta["val"] if name == "statistics" else outputs[-2]
            block = batch_statistics.ROWS if name == "statistics" else product.ROWS
            _, groups = batch_statistics.division(counted[:, 0].numel(), block)
            # Two float32 per channel and group are written and read again.
            found[STATISTICS] += 16 * groups * counted.shape[1]
        return found

    def _least(self, read: frozenset[Node]) -> frozenset[Node]:
        """Returns the values that a pass must read, except those it can recompute from others, as a ReLU's sign."""
        for value in sorted(read, key=self._place.__getitem__, reverse=True):
            if self._kinds[value] == "pointwise":
                others = (read - {value}) | self._inputs(value)
                if sum(map(_bytes, others)) < sum(map(_bytes, read)):
                    read = others
        return read

    def _choose_written(self, nodes: list[Node]) -> None:
        passes: dict[Node, set[Node]] = {}
        needed = set(self._outputs)
        for node in reversed(nodes):
            users = [user for user in node.users if user.op == "call_function"]
            if any(self._kinds[user] in _OWN_PASSES for user in users) or node.target is aten.copy_.default:
                needed.add(_plain(node))
            if node in needed and self._kinds[node] == "view":
                needed.add(_plain(node))
            passes[node] = set()
            for user in users:
                ends = self._kinds[user] not in ("pointwise", "view") or user in needed
                passes[node] |= {user} if ends else passes[user]
        for node in nodes:
            kind = self._kinds[node]
            if kind == "made":
                self._read[node] = frozenset()
            elif kind in ("pointwise", "view"):
                inputs = self._inputs(node)
                # Reductions of the same values are one pass.
                reductions = [user for user in passes[node] if self._kinds[user] == "reduction"]
                count = len(passes[node]) - max(0, len(reductions) - 1)
                reading = sum(map(_bytes, inputs))
                cheaper = len(node.users) > 1 and count * reading > reading + count * _bytes(node)
                written = kind == "pointwise" and (node in needed or cheaper)
                self._read[node] = frozenset({node}) if written else inputs
            else:
                self._read[node] = frozenset({node})

    def _inputs(self, node: Node) -> frozenset[Node]:
        return frozenset().union(*(self._read[value] for value in node.all_input_nodes))

    def _largest_inputs(self, node: Node) -> frozenset[Node]:
        inputs = self._inputs(node)
        largest = max(map(_bytes, inputs), default=0)
        return frozenset(value for value in inputs if _bytes(value) == largest)

    def _reductions(self) -> list[list[Node]]:
        """Returns the reductions, grouped into passes."""
        groups: list[list[Node]] = []
        for node in self._nodes:
            if self._kinds[node] != "reduction":
                continue
            for group in groups:
                alike = any(self._largest_inputs(node) & self._largest_inputs(other) for other in group)
                if alike and not any(self._is_before(other, node) for other in group):
                    group.append(node)
                    break
            else:
                groups.append([node])
        return groups

    def _ancestors(self, nodes: list[Node]) -> dict[Node, int]:
        """Returns for each node the set of nodes that it depends on, itself included, as bits at their positions."""
        self._place = {node: place for place, node in enumerate(nodes)}
        found: dict[Node, int] = {}
        for node, place in self._place.items():
            found[node] = 1 << place
            for value in node.all_input_nodes:
                found[node] |= found[value]
        return found

    def _is_before(self, node: Node, other: Node) -> bool:
        return bool(self._before[other] >> self._place[node] & 1)


def _kind(node: Node) -> str:
    """Returns the kind of a node.

    A purpose for operations that are separate passes, otherwise "reduction", "pointwise", "view", "item" (one of
    several results), "made" (computed from nothing) or "input".
    """
    if node.op != "call_function":
        return "input"
    if node.target is operator.getitem:
        return "item"
    name = _name(node)
    if _is_ours(node):
        return _OURS[name]
    if name in _MADE:
        return "made"
    if name in _VIEWS:
        return "view"
    if name in _PRODUCTS:
        return PRODUCTS
    if "pool" in name:
        return POOLING
    assert isinstance(node.target, torch._ops.OpOverload)
    if torch.Tag.reduction in node.target.tags:
        return "reduction"
    if torch.Tag.pointwise in node.target.tags or name in _POINTWISE:
        return "pointwise"
    return OTHER


def _name(node: Node) -> str:
    assert isinstance(node.target, torch._ops.OpOverload)
    return node.target.overloadpacket.__name__


def _is_ours(node: Node) -> bool:
    """Whether a node is one of _OURS."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target.namespace == "label_refinery" and _name(node) in _OURS


def _plain(node: Node) -> Node:
    """Returns the value that a view is a view of, or the node itself."""
    while _kind(node) == "view":
        node = node.all_input_nodes[0]
    return node


def _bytes(node: Node) -> int:
    """Returns the size of a value in bytes; for several results, of those that are used."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return sum(_bytes(user) for user in node.users if _kind(user) == "item" and user.users)
    # The position of a maximum in its window takes one byte, as compilers store it.
    size = 1 if value.dtype == torch.int64 and _kind(node) == "item" else value.element_size()
    return value.numel() * size
