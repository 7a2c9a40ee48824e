"""The memory of one rank among several, where the other ranks are played by the test."""

import torch

from nanovllm.kernels.all_reduce import BLOCK, SLOTS
from nanovllm.parallel.peer_memory import Peers


class Inbox:
    """Buffers as `connect_peers` makes them: this rank's, and one in place of each other rank's."""

    def __init__(self, rank: int, size: int, dtype: torch.dtype, capacity: int) -> None:
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
        shape = (SLOTS, size, capacity)
        self.buffers = [torch.full(shape, -1, dtype=bits) for _ in range(size)]
        addresses = torch.tensor([buffer.data_ptr() for buffer in self.buffers])
        slots = torch.zeros(-(-capacity // BLOCK), dtype=torch.int32)
        abort = torch.zeros(1, dtype=torch.int32)
        self.peers = Peers(rank, size, dtype, capacity, addresses, slots, abort)

    def fill(self, messages: dict[int, torch.Tensor]) -> None:
        """What other ranks write here in the next call, by rank."""
        for sender, message in messages.items():
            # Each program of the kernel has a slot of its own turn.
            for program, piece in enumerate(message.reshape(-1).split(BLOCK)):
                slot, first = int(self.peers.slots[program]), program * BLOCK
                place = self.buffers[self.peers.rank][slot, sender]
                place[first : first + len(piece)] = piece.view(self.peers.bits)
        self._slots = self.peers.slots.clone()

    def received(self, sender: int) -> torch.Tensor:
        """[capacity], as integers: what the next call would find of another rank."""
        rows = self.buffers[self.peers.rank][:, sender].unflatten(1, (-1, BLOCK))
        return torch.cat([rows[slot, i] for i, slot in enumerate(self.peers.slots.tolist())])

    def sent_to(self, other: int, shape: tuple[int, ...]) -> torch.Tensor:
        """What the last call has written to another rank."""
        rows = self.buffers[other][:, self.peers.rank].unflatten(1, (-1, BLOCK))
        flat = torch.cat([rows[slot, i] for i, slot in enumerate(self._slots.tolist())])
        return flat.view(self.peers.dtype)[: torch.Size(shape).numel()].view(shape)
