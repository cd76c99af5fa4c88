"""Every algorithm as small as it can be; a new one is a line here, and trains every family."""

from tests.trainers import online_runs, pair_runs


def dpo(pipe, folder, *, pairs, updates):
    return pair_runs.trainer_of(
        folder,
        pipe=pipe,
        pairs=pairs,
        updates=updates,
        pairs_per_update=2,
        learning={"micro_batch": 2},
        resolution=(48, 64),
        preflight=True,
    )


def drawing(make):
    def made(pipe, folder, *, pairs, updates):
        return make(folder, pipe=pipe, learning=online_runs.learning(updates))

    return made


ALGORITHMS = {"dpo": dpo, **{name: drawing(make) for name, make in online_runs.TRAINERS.items()}}
