"""An hour of training in one process, whose memory, threads and file handles must stay what they are.

    python -m tests.soak --minutes 60
    make soak MINUTES=60

A round is a whole training of a few seconds, opened and closed again, after which the process is measured. Rounds
change among storages and decoders (training.py), while one more training, begun before the first round, goes on with
an epoch a round. What counts as flat: verdict.py.
"""
