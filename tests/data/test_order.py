"""The order of a run is a function of the position alone, and fair to every kind of item."""

from collections import Counter
from itertools import pairwise

import pytest

from rpo.data.order import GroupedOrder, visit

SEED = 7


@pytest.mark.parametrize(("count", "group"), [(8, 4), (7, 3), (3, 5), (1, 1), (1, 4), (10, 1)])
def test_of_one_kind_the_grouped_order_is_the_plain_one(count, group):
    order = GroupedOrder([count], group, SEED)
    assert [order.visit(position) for position in range(300)] == [
        (0, *visit(count, SEED, position)) for position in range(300)
    ]


COUNTS = [(13, 5, 1), (40, 40), (2, 3, 1, 1), (100, 7, 3, 2, 2)]


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("group", [1, 4, 6])
def test_a_group_is_of_one_kind_and_every_item_is_visited_alike_up_to_one_group(counts, group):
    order, epochs = GroupedOrder(counts, group, SEED), 12
    ends = [sum(epoch * count // group for count in counts) for epoch in range(epochs + 1)]
    seen: Counter[tuple[int, int]] = Counter()
    for start, end in pairwise(ends):
        for number in range(start, end):
            visits = [order.visit(number * group + place) for place in range(group)]
            assert len({kind for kind, _, _ in visits}) == 1
            seen.update((kind, item) for kind, item, _ in visits)
        epoch = ends.index(end, ends.index(start) + 1)
        for kind, count in enumerate(counts):
            of_kind = [seen[kind, item] for item in range(count)]
            assert max(of_kind) - min(of_kind) <= 1
            assert epoch * count - group < sum(of_kind) <= epoch * count


def test_a_kind_visits_all_its_items_in_each_of_its_epochs():
    order = GroupedOrder([9, 4], 3, SEED)
    visits = [order.visit(position) for position in range(600)]
    for kind, count in ((0, 9), (1, 4)):
        own = [(item, epoch) for found, item, epoch in visits if found == kind]
        for epoch in range(len(own) // count):
            some = own[epoch * count : (epoch + 1) * count]
            assert {item for item, _ in some} == set(range(count)) and {at for _, at in some} == {epoch}


def test_kinds_are_mixed_and_seeds_differ():
    def kinds(seed):
        order = GroupedOrder([50, 50], 5, seed)
        return [order.visit(position)[0] for position in range(0, 500, 5)]

    assert kinds(0) != kinds(1)
    assert sum(one != other for one, other in pairwise(kinds(0))) > 20  # of 50 expected


@pytest.mark.parametrize("position", [0, 17, 1234, 10**7])
def test_a_position_is_known_without_those_before_it(position):
    whole = GroupedOrder([13, 5, 1], 4, SEED)
    around = [whole.visit(at) for at in range(max(0, position - 40), position + 1)]
    assert around[-1] == GroupedOrder([13, 5, 1], 4, SEED).visit(position) == whole.visit(position)
