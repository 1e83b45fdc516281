"""keeper.py COMMAND...: run a daemon, adopt what it leaves behind, end when nothing of it is left.

A job's processes are no children of slurmd's, and some break away from the job as well. As
their subreaper the keeper stays their ancestor, so all of a node can be found and ended.
"""

import ctypes
import os
import signal
import sys

PR_SET_CHILD_SUBREAPER = 36

if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
    sys.exit(f"keeper: prctl: {os.strerror(ctypes.get_errno())}")
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
    # Not SIG_IGN: the daemon would inherit that.
    signal.signal(number, lambda *_: None)
os.spawnvp(os.P_NOWAIT, sys.argv[1], sys.argv[1:])
while True:
    try:
        os.wait()
    except ChildProcessError:
        break
