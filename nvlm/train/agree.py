"""The ranks of a replica agree on the records that turned out broken when their images were decoded."""

from __future__ import annotations

import torch
import torch.distributed as dist

from nvlm.data.loader import Failed, StepData


def agreed(data: StepData, replica: dist.ProcessGroup, device: torch.device) -> StepData:
    """`data` without the records that any rank of the replica could not decode. A collective call of the replica.

    Usually there are none, which one sum tells.
    """
    count = torch.tensor(len(data.failed), device=device)
    if replica.size() > 1:
        dist.all_reduce(count, group=replica)
    if not count:
        return data
    found: list[tuple[Failed, ...]] = [()] * replica.size()
    dist.all_gather_object(found, data.failed, group=replica)
    # A record may have several broken images, on several ranks: the first rank's reason is kept.
    first = {one.number: one for failed in reversed(found) for one in failed}
    return data.without([first[number] for number in sorted(first)])
