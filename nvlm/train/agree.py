"""The ranks of a replica, which decode different images, tell one another what they found."""

from __future__ import annotations

import torch
import torch.distributed as dist

from nvlm.config.values import ConfigError
from nvlm.data.loader import Failed, StepData
from nvlm.processes import groups


def agreed(data: StepData, replica: dist.ProcessGroup, device: torch.device) -> StepData:
    """`data` without the records that any rank of the replica could not decode. A collective call of the replica.

    Usually there are none, which one sum tells. A replica of one rank does not wait for its GPU. Raises ConfigError
    on all ranks if one found that its data changed.
    """
    here = bool(data.failed) or data.changed is not None
    if not (groups.any_rank(here, replica, device) if replica.size() > 1 else here):
        return data
    found: list[tuple[str | None, tuple[Failed, ...]]] = [(None, ())] * replica.size()
    dist.all_gather_object(found, (data.changed, data.failed), group=replica)
    if changed := next((reason for reason, _ in found if reason is not None), None):
        raise ConfigError(changed)
    # A record may have several broken images, on several ranks: the first rank's reason is kept.
    first = {one.number: one for _, failed in reversed(found) for one in failed}
    return data.without([first[number] for number in sorted(first)])
