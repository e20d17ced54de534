"""What an optimizer step sends between processes, as a formula; tests count the same on real processes.

Reductions travel in fp32, weights in their own type. N parameters of e bytes, m micro-steps, n processes:

    stage    sum of all gradients    scatter sums    gather weights
    1        4 N, once               -               e N, once
    2        4 N, m times            -               e N, once
    3        -                       4 N, m times    e N, once for small tensors, else m times

ZeRO-3 keeps what the forward pass gathered for the backward pass, up to 1e9 elements. In one process,
nothing is sent. The sums of losses and gradient norms take 20 bytes more.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from dit_scale.config import EngineConfig, ModelConfig
from dit_scale.data.batch_plan import BatchPlan
from dit_scale.models import dit

SMALL = 100_000
"""Elements up to which ZeRO-3 keeps a tensor on every process between steps."""


@dataclass(frozen=True)
class Traffic:
    """Bytes of the complete tensors in each kind of collective of a step."""

    world: int
    summed: int
    scattered: int
    gathered: int

    @property
    def sent(self) -> int:
        """Bytes that each process sends when collectives go around a ring of all processes.

        A sum goes around it twice: once to add up the parts, and once to distribute them.
        """
        return (2 * self.summed + self.scattered + self.gathered) * (self.world - 1) // self.world


def sizes(config: ModelConfig) -> tuple[int, ...]:
    """The number of elements of each parameter."""
    plain = config.model_copy(update={"attention": "sdpa"})  # the only one that every machine can build
    return tuple(p.numel() for p in dit.build(plain, 0, "meta", initialise=False).parameters())


def traffic(sizes: Iterable[int], config: EngineConfig, plan: BatchPlan) -> Traffic:
    """The traffic of a step for parameters with these numbers of elements, in bf16 unless fp32 is set."""
    numbers = tuple(sizes)
    element, total = 4 if config.precision == "fp32" else 2, sum(numbers)
    if plan.world == 1:
        return Traffic(1, 0, 0, 0)
    if config.zero_stage < 3:
        times = plan.micro_steps if config.zero_stage == 2 else 1
        return Traffic(plan.world, summed=4 * total * times, scattered=0, gathered=element * total)
    small = sum(number for number in numbers if number <= SMALL)
    gathered = element * (small + (total - small) * plan.micro_steps)
    return Traffic(plan.world, summed=0, scattered=4 * total * plan.micro_steps, gathered=gathered)
