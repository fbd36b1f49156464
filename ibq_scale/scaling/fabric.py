"""Time of collectives on given links: a ring's bytes over its narrowest link, plus a latency for each message.

A ring over n GPUs carries (n − 1)/n of a tensor through every GPU, twice that for an all-reduce. The time is these
bytes over the bandwidth of the narrowest link ("bus bandwidth", github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md):

    within a node               a GPU's link
    over nodes, neighbours      min(link, g·net): each of a node's g network cards carries one ring
    over nodes, replicas        min(link, r·net): a node holds r of these GPUs, and all groups' rings run at once

A message over n GPUs takes log₂ of the GPUs of a node plus log₂ of the nodes hops, as in a tree (NCCL's choice for
small messages). Congestion and other jobs are not modelled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ibq_scale.scaling.communication import Transfer
from ibq_scale.scaling.devices import Device

# Assumed: share of a link's data-sheet rate reached by collectives.
LINK_SHARE = 0.8
# Assumed, seconds of one hop: within a node, and over the network.
NODE_LATENCY, NET_LATENCY = 3e-6, 8e-6
# Default network bytes/s per GPU: one NDR card (400 Gbit/s) each.
NDR = 50e9


@dataclass(frozen=True)
class Fabric:
    """`node`: GPUs per node. `link`: bytes/s of a GPU within its node, `net`: to other nodes, in one direction."""

    node: int
    link: float
    net: float

    @staticmethod
    def of(device: Device, node: int, *, link: float | None = None, net: float | None = None) -> Fabric:
        """The fabric of a GPU's data sheet, unless given."""
        return Fabric(node, link or device.link, net or NDR)

    def seconds(self, transfer: Transfer, world: int) -> float:
        """Seconds of all of a step's messages of this kind, in a world of so many ranks."""
        here, nodes = self._spread(transfer, world)
        bandwidth = self.link if nodes == 1 else min(self.link, here * self.net)
        hops = math.log2(here) * NODE_LATENCY + math.log2(nodes) * NET_LATENCY
        messages = transfer.times * transfer.messages * (2 if transfer.kind == "all-reduce" else 1)
        return transfer.sent / (LINK_SHARE * bandwidth) + messages * hops

    def _spread(self, transfer: Transfer, world: int) -> tuple[float, float]:
        """Number of the transfer's ranks per node, and number of nodes."""
        apart = world / transfer.ranks if transfer.spread else 1.0
        here = min(max(1.0, self.node / apart), float(transfer.ranks))
        return here, max(1.0, transfer.ranks / here)
