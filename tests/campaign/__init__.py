"""The campaign: a live server under load while a killer picks its processes at random.

``python -m tests.campaign --minutes 5 --seed N``. A file an idea:

    killer     a process that kills and stops others, and says whom and when
    pool       a process whose children attach, address, write, create and fail, until they die
    clients    the clients, in one loop; each notes exactly what it was told and what it was not
    programs   redis-py, redis-benchmark and HTTP beside them
    figures    what is counted
    promises   what may be promised, asserted on the notes
    checker    what must be true of the machine when all is quiet again
    runner     starts all that, follows killed supervisors, ends it

Who dies and when follows from the seed; what the machine makes of it does not.
"""
