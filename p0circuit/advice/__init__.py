"""Advice: what the first-token bias does to one model on one text, and what to do about it.

1. *Is there a P0 sink?* Sink heads are selected on one half of the prompts. On the other half their excess score has
   to be above twice that of uniform attention, beyond doubt. The text is measured as it is and then after BOS. The
   latter does not count if the model predicts worse after BOS, beyond doubt: then it was hardly trained with this BOS.
2. *Does it depend on BOS?* It does if less than half of the excess score after BOS is left without BOS.
3. *From which layer on?* The first layer with a sink head whose own excess score passes the same test.
4. *What breaks if the first tokens are dropped?* Decoding with a window and no first tokens is compared with the first
   four kept (C17). A smaller number is enough if it costs less than the limit beyond doubt. Four are the answer if all
   smaller numbers cost more beyond doubt; where that cannot be decided, four are advised to be safe.
5. *Is int8 a risk?* The loss that one scale per prompt adds decides (C18). Where no loss can be measured, the error
   that is left when P0 is kept in high precision decides. Keeping P0 is advised only if it helps beyond doubt.
6. *Which heads are dormant?* Those that can be zeroed, in order of sink score, highest first, at 1 % more loss (C19).

Every answer has the values behind it with their 95 % intervals. "Beyond doubt" means that the whole interval is on one
side of the limit; an interval on both sides is answered "cannot tell". A question that this model or this text cannot
answer gets the same answer, with the reason. Where there is no sink, nothing is advised because of one. The limits were
fixed before anything was measured.
"""

from p0circuit.advice.answers import Advice as Advice, advise as advise, passes as passes
from p0circuit.advice.figure import draw_costs as draw_costs
from p0circuit.advice.page import write_advice as write_advice
from p0circuit.advice.statement import Statement as Statement
