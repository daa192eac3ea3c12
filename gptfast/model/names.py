"""How a parameter of ours is made of the tensors of someone else's file."""

from __future__ import annotations


class Source:
    """The tensors, by name, whose rows stacked in this order are one parameter.

    transposed: stored (in, out), as GPT-2's Conv1D does.
    heads: for each tensor, the number of heads whose rows are stored for interleaved rotation and have to be put in
        order; 0 where they are in order.
    """

    def __init__(self, *names: str, transposed: bool = False, heads: tuple[int, ...] = ()) -> None:
        self.names, self.transposed, self.heads = names, transposed, heads or (0,) * len(names)


def first(names: list[str], limit: int = 3) -> str:
    """A few names for an error message."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
