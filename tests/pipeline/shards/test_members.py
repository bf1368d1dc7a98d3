"""What becomes of a member's bytes."""

import gc
import io
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from pipeline.shards.members import decode_array


def test_arrays_are_read_by_many_threads_while_the_garbage_collector_lets_others_in():
    buffer = io.BytesIO()
    array = np.arange(192, dtype=np.float16).reshape(3, 8, 8)
    np.save(buffer, array)

    def callback(phase, info):
        return [number for number in range(100)]  # Python that takes time, so that threads are switched

    interval, thresholds = sys.getswitchinterval(), gc.get_threshold()
    sys.setswitchinterval(1e-6)
    gc.set_threshold(5)
    gc.callbacks.append(callback)
    try:
        with ThreadPoolExecutor(8) as pool:
            read = list(pool.map(lambda _: decode_array(buffer.getvalue()), range(2000)))
    finally:
        gc.callbacks.remove(callback)
        gc.set_threshold(*thresholds)
        sys.setswitchinterval(interval)
    for one in read:
        np.testing.assert_array_equal(one, array)
