"""How a batch is cut: over processes, then into micro-batches of similar length.

What a reader may rely on: every trajectory lands in exactly one place, and the cut changes nothing
but speed and memory. The loss is divided by the tokens of the whole batch (train.py).
"""


def flat(lists) -> list:
    """The items of all lists, in order."""
    return [item for items in lists for item in items]


def length(trajectories: list) -> int:
    """Tokens of trajectories."""
    return sum(len(t.tokens) for t in trajectories)


def share(groups: list[list], rank: int, world: int) -> list[list]:
    """The groups of one process: about equally many tokens for each of `world` processes.

    Where there are few groups they are cut into single trajectories.
    """
    if world == 1:
        return groups
    units = groups
    if len(groups) < 2 * world:
        units = [[t] for group in groups for t in group]
    loads = [[] for _ in range(world)]
    tokens = [0] * world
    for unit in sorted(units, key=length, reverse=True):
        lightest = tokens.index(min(tokens))
        loads[lightest].append(unit)
        tokens[lightest] += length(unit)
    return loads[rank]


def microbatches(groups: list[list], budget: int) -> list[list]:
    """Lists of trajectories of at most `budget` packed tokens each, shorter ones first.

    A prompt counts once for those of its group that lie together, as engine/fast.py packs it.
    """
    batches = []
    size = budget
    for group in sorted(groups, key=lambda group: max(len(t.tokens) for t in group)):
        for t in sorted(group, key=lambda t: len(t.tokens)):
            size += len(t.tokens)
            if batches and batches[-1][-1].sample is t.sample:
                size -= t.prompt_length
            if size > budget:
                batches.append([])
                size = len(t.tokens)
            batches[-1].append(t)
    return batches
