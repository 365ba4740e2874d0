"""Learning-rate schedules as optax functions of the step, scaled to a peak of one."""

from __future__ import annotations

import optax

from jaxlm.config import TrainOptions


def shape(cfg: TrainOptions) -> optax.Schedule:
    """The schedule relative to its peak: step -> float32 in [0, 1]. Optimizers multiply it by their own peak rate.

    Linear warm-up to 1 over `warmup_steps` (the first step already moves), then: `constant`; `cosine` (Loshchilov &
    Hutter, arXiv 1608.03983) or `linear` down to `final_lr_ratio` at the last step; `wsd`, constant and then linear
    over the last `decay_fraction` of the steps (Hu et al., MiniCPM, arXiv 2404.06395).
    """
    rest = cfg.steps - cfg.warmup_steps
    match cfg.schedule:
        case "constant":
            after = optax.constant_schedule(1.0)
        case "cosine":
            after = optax.cosine_decay_schedule(1.0, rest, alpha=cfg.final_lr_ratio)
        case "linear":
            after = optax.linear_schedule(1.0, cfg.final_lr_ratio, rest)
        case "wsd":
            decay = max(1, round(rest * cfg.decay_fraction))
            after = optax.linear_schedule(1.0, cfg.final_lr_ratio, decay, transition_begin=rest - decay)
    if cfg.warmup_steps == 0:
        return after
    warmup = optax.linear_schedule(1 / (cfg.warmup_steps + 1), 1.0, cfg.warmup_steps)
    return optax.join_schedules([warmup, after], [cfg.warmup_steps])
