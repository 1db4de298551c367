"""For all tests: Ctrl-C reaches the processes that they start, also where the tests run in a shell's background."""

import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
