"""A cache that forgets: by age, and, when it is full, whatever was used longest ago."""

import time
from collections import OrderedDict
from functools import wraps


class ExpiringCache:
    def __init__(self, capacity=128, seconds=60.0, clock=time.monotonic):
        if capacity < 1:
            raise ValueError("capacity must be at least 1")
        self.capacity = capacity
        self.seconds = seconds
        self.hits = self.misses = 0
        self._clock = clock
        self._entries = OrderedDict()

    def __len__(self):
        return len(self._entries)

    def __setitem__(self, key, value):
        self._entries[key] = (self._clock() + self.seconds, value)
        self._entries.move_to_end(key)
        while len(self._entries) > self.capacity:
            self._entries.popitem(last=False)

    def __getitem__(self, key):
        expires, value = self._entries[key]
        if expires <= self._clock():
            del self._entries[key]
            raise KeyError(key)
        self._entries.move_to_end(key)
        return value

    def purge(self):
        """Drop everything that has expired and say how much it was."""
        now = self._clock()
        stale = [key for key, (expires, _) in self._entries.items() if expires <= now]
        for key in stale:
            del self._entries[key]
        return len(stale)


def remembered(cache):
    """Decorate a function of hashable arguments so that `cache` answers for it when it can."""

    def decorate(function):
        @wraps(function)
        def wrapper(*args):
            try:
                result = cache[args]
                cache.hits += 1
            except KeyError:
                result = cache[args] = function(*args)
                cache.misses += 1
            return result

        return wrapper

    return decorate


if __name__ == "__main__":
    cache = ExpiringCache(capacity=3, seconds=0.05)

    @remembered(cache)
    def slow_square(x):
        time.sleep(0.01)
        return x * x

    print([slow_square(x) for x in (1, 2, 1, 3, 4, 1)], cache.hits, cache.misses)
    time.sleep(0.06)
    print("purged", cache.purge(), "left", len(cache))
