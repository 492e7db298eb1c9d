"""FLOPs of operators: torch's own formulas, and those for operators that torch's counter leaves out or counts without regard to
causality.

Shapes: B batch, A heads, Q queries, K keys, D width of a head.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

Formula = Callable[..., int]
_ATEN = torch.ops.aten


def flops_of(operator: Any, arguments: Sequence[Any], named: Mapping[str, Any], result: Any) -> int:
    """Returns the FLOPs of a call of `operator`, 0 if it multiplies no matrices."""
    packet = _not_in_place(operator.overloadpacket)
    if formula := _FORMULAS.get(packet):
        return formula(operator, arguments, named, result)
    if counted := flop_registry.get(packet):
        return int(counted(*arguments, **named, out_val=result))
    return 0


def _not_in_place(packet: Any) -> Any:
    """Returns `packet` or, if it works in place, that which returns a new tensor, for which torch has the formula."""
    name = packet.__name__
    return getattr(_ATEN, name[:-1], packet) if name.endswith("_") and not name.endswith("__") else packet


def _attention(products: int) -> Formula:
    """Returns the formula of a kernel that multiplies [Q, D] by [D, K], or matrices of the same sizes, `products` times. A causal
    kernel multiplies only what the mask leaves: for Q = K, (K + 1) / 2 keys for the average query."""

    def formula(operator: Any, arguments: Sequence[Any], named: Mapping[str, Any], result: Any) -> int:
        given = {argument.name: value for argument, value in zip(operator._schema.arguments, arguments, strict=False)} | dict(named)
        batch, heads, queries, width = map(int, given["query"].shape)
        keys = int(given["key"].shape[2])
        pairs = queries * (2 * keys - queries + 1) // 2 if given.get("is_causal") else queries * keys
        return products * 2 * batch * heads * width * pairs

    return formula


def _grouped(operator: Any, arguments: Sequence[Any], named: Mapping[str, Any], result: Any) -> int:
    """Rows [N, I] of several experts by weights [E, I, O]; or [I, N] by [N, O], of which each expert has some of the N."""
    left, right = arguments[0], arguments[1]
    return 2 * int(left.shape[-2]) * int(left.shape[-1]) * int(right.shape[-1])


def _scaled(operator: Any, arguments: Sequence[Any], named: Mapping[str, Any], result: Any) -> int:
    """A product of matrices in float8."""
    return int(flop_registry[_ATEN.mm](arguments[0], arguments[1], out_val=result))


def _added(operator: Any, arguments: Sequence[Any], named: Mapping[str, Any], result: Any) -> int:
    """A matrix plus a product, of which torch's formula does not expect a dtype for the result."""
    return int(flop_registry[_ATEN.mm](arguments[1], arguments[2], out_val=result))


_FORMULAS: dict[Any, Formula] = {
    _ATEN._scaled_dot_product_flash_attention: _attention(2),
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention(2),
    _ATEN._scaled_dot_product_flash_attention_backward: _attention(5),
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention(5),
    _ATEN._grouped_mm: _grouped,
    _ATEN._scaled_mm_v2: _scaled,
    _ATEN.addmm: _added,
}
