"""`python -I -S slurm/hold.py PROGRAM ARGS`: run a program from whose start on signals that tell a job to leave wait for it.

Until a rank has its handlers, which takes it the seconds of its imports, such a signal would end it, and with it the job. A
signal that is blocked stays pending across the program's start, and is delivered when `Task` or `saev_dist.signals` unblock it.
(-I -S: without what a site may import first.)
"""

import os
import signal
import sys

HELD = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
    os.execvp(sys.argv[1], sys.argv[1:])
