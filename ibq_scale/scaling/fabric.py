"""How long collectives take on given links: a ring's bytes over the narrowest place, and a latency for each message.

A ring over n GPUs carries (n − 1)/n of a tensor through every GPU, twice that for an all-reduce; so the time is these
bytes over the bandwidth of the narrowest place ("bus bandwidth", github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md):

    within a node               a GPU's link
    over nodes, neighbours      min(link, g·net): rings are laid so that each of a node's g network cards carries one
    over nodes, replicas        min(link, r·net): of these GPUs a node holds r, and the others' rings are under way too

A message over n GPUs waits log₂ of the GPUs of a node and log₂ of the nodes in turn, as trees do (NCCL takes them where
messages are small). Congestion and other jobs are not in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ibq_scale.scaling.communication import Transfer
from ibq_scale.scaling.devices import Device

# Assumed: the share of a link's sheet rate that collectives reach.
LINK_SHARE = 0.8
# Assumed, seconds of one hop: within a node, and over the network.
NODE_LATENCY, NET_LATENCY = 3e-6, 8e-6
# Bytes/s of network a GPU where nobody says: one NDR card (400 Gbit/s) each.
NDR = 50e9


@dataclass(frozen=True)
class Fabric:
    """`node`: GPUs a node. `link`: bytes/s of a GPU to the others of its node, `net`: to other nodes, one direction."""

    node: int
    link: float
    net: float

    @staticmethod
    def of(device: Device, node: int, *, link: float | None = None, net: float | None = None) -> Fabric:
        """Of a GPU's data sheet, where nothing else is given."""
        return Fabric(node, link or device.link, net or NDR)

    def seconds(self, transfer: Transfer, world: int) -> float:
        """Of all of a step's messages of this kind, in a world of so many ranks."""
        here, nodes = self._spread(transfer, world)
        bandwidth = self.link if nodes == 1 else min(self.link, here * self.net)
        hops = math.log2(here) * NODE_LATENCY + math.log2(nodes) * NET_LATENCY
        messages = transfer.times * transfer.messages * (2 if transfer.kind == "all-reduce" else 1)
        return transfer.sent / (LINK_SHARE * bandwidth) + messages * hops

    def _spread(self, transfer: Transfer, world: int) -> tuple[float, float]:
        """Of the transfer's ranks, how many are in one node, and over how many nodes they are."""
        apart = world / transfer.ranks if transfer.spread else 1.0
        here = min(max(1.0, self.node / apart), float(transfer.ranks))
        return here, max(1.0, transfer.ranks / here)
