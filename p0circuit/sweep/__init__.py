"""Many models, checkpoints and experiments at once, on Ray: each combination is a task that can fail and be repeated.

1. Tasks are all combinations of model, checkpoint and experiment; each declares its CPUs, GPUs and memory (`tasks.py`).
2. A worker loads the model, makes the prompts, and hashes everything that decides the result
   (`reproduction.result_key`). If `out` has a result with that key, nothing is measured (`worker.py`).
3. The worker returns the result as files, and the driver writes them at once, the JSON last (`store.py`). Workers need
   no access to `out`; only the driver writes, so every result in `out` is complete.
4. A task whose worker or node dies is started again on another one. A driver that dies is started again by hand, and
   skips what is done. A task that raises, or whose result cannot be written, is named in the summary; the others go on.

    <out>/<model>[@checkpoint]/<experiment>.json, tables/, figures/, attention/     as `Result.save` writes them
    <out>/<model>[@checkpoint]/left-out/<experiment>.json                           not applicable, and the reason
    <out>/sweep.json                                                                the summary of the last sweep
"""

from p0circuit.sweep.run import sweep as sweep
from p0circuit.sweep.tasks import Outcome as Outcome, Sweep as Sweep, Task as Task, memory_of as memory_of
