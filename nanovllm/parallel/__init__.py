"""Tensor parallelism (Shoeybi et al. 2019, arXiv:1909.08053): several GPUs share each step.

Every rank is a process with a part of each layer, and runs the same steps. Rank 0 is in the
caller's process; it alone schedules, and sends each step to the others. The folder may be skipped
by who reads how the engine works on one GPU.

    ranks.py         the processes: started, fed, watched, ended
    worker.py        what runs in each
    rank_runner.py   the model runner of a rank, and that of rank 0
    group.py         what ranks say to each other: sums, maxima, parts put together
    peer_memory.py   memory of one GPU that the others write to
    sharding.py      which part of the model a rank has
    layers.py        linear layers and embedding of which a rank has a part
    sampler.py       a token for each row, of a vocabulary of which a rank has a part
"""
