"""Show that signals on the usual stack break the heap amid TensorFlow's products.

    python tests/signal_stack.py                     signals on the usual stack
    python -X faulthandler tests/signal_stack.py     on one of their own, as gan_mnist.py has it

Seen with TensorFlow 2.21 on two cores with AVX-512, without AMX: "corrupted size vs. prev_size"
and an abort in 2 of 5 minutes on the usual stack, once after 6 seconds, and in none of 4 with one
of their own. On cores with AMX it took seconds.
"""

import signal
import time

import tensorflow as tf

left, right = tf.random.normal((1000, 256)), tf.random.normal((256, 512))
signal.signal(signal.SIGALRM, lambda *_: None)
signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)  # 2,000 signals a second
end = time.monotonic() + 60
while time.monotonic() < end:
    tf.matmul(left, right)
signal.setitimer(signal.ITIMER_REAL, 0)
print("Nothing broke in a minute.")
