"""Expert parallelism: each rank holds some of a layer's experts, and peers see equal tokens, as in tensor parallelism.

Each rank passes the tokens for which its own experts are chosen through them; the sum over the ranks is the layer's
output. Nothing else of the model is split.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["LocalExperts"]


class LocalExperts(nn.Module):
    """This rank's share of a layer's stacked experts, replacing `MixtralExperts`, with the same parameter names.

    Collective: every rank of the mesh, here and in each forward and backward pass.

    Args:
        experts: The whole layer's experts, `gate_up_proj` (experts, 2 * inner, hidden) and `down_proj`
            (experts, hidden, inner), equal on all ranks.
        mesh: One dimension, which divides the number of experts.
    """

    def __init__(self, experts: nn.Module, mesh: DeviceMesh) -> None:
        super().__init__()
        self._mesh = mesh
        self._activation: Callable[[Tensor], Tensor] = experts.act_fn  # type: ignore[assignment]
        for name, parameter in experts.named_parameters():
            self.register_parameter(name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)])))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted outputs of each token's experts.

        Args:
            hidden_states: Shape (tokens, hidden).
            top_k_index: Which experts a token has, shape (tokens, k).
            top_k_weights: Their weights, shape (tokens, k).
        """
        gate_up, down = _local(self.gate_up_proj), _local(self.down_proj)
        hidden, weights = self._entering(hidden_states), self._entering(top_k_weights)
        total = torch.zeros_like(hidden)
        first = self._mesh.get_local_rank() * gate_up.shape[0]
        for number in range(gate_up.shape[0]):
            # An expert that no token has chosen takes part as well: its gradient is zero, not missing.
            token, position = torch.where(top_k_index == first + number)
            gate, up = nn.functional.linear(hidden[token], gate_up[number]).chunk(2, dim=-1)
            output = nn.functional.linear(self._activation(gate) * up, down[number]) * weights[token, position, None]
            total = total.index_add(0, token, output.to(total.dtype))
        return self._leaving(total)

    def _entering(self, tensor: Tensor) -> Tensor:
        """Equal on all ranks; of its gradient each rank finds a part."""
        shared = DTensor.from_local(tensor, self._mesh, [Replicate()], run_check=False)
        return shared.to_local(grad_placements=[Partial()])

    def _leaving(self, tensor: Tensor) -> Tensor:
        """Each rank has a part of the sum; its gradient is equal on all of them."""
        partial = DTensor.from_local(tensor, self._mesh, [Partial()], run_check=False)
        return partial.redistribute(placements=[Replicate()]).to_local()


def _local(parameter: Any) -> Tensor:
    return cast(DTensor, parameter).to_local()
