"""Early, middle and late exits, as the paper groups them."""

EARLY_TO_LATE = ("early", "middle", "late")


def exit_groups(num_exits: int) -> dict[str, list[int]]:
    """Returns {name of an exit group: its exits}: 1..num_exits in three nearly equal parts, as `np.array_split` cuts.

    If the parts are not equally large, the first ones are larger. A model with fewer than three exits has as many
    groups as exits.
    """
    size, larger = divmod(num_exits, len(EARLY_TO_LATE))
    groups, first = {}, 1
    for index, name in enumerate(EARLY_TO_LATE):
        end = first + size + (index < larger)
        if end > first:
            groups[name] = list(range(first, end))
        first = end
    return groups
