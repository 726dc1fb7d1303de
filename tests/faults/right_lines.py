"""Right command lines near the borders of what is allowed, each with a file that it leaves: they must stay accepted."""

from __future__ import annotations

from tests.faults.wrong_lines import PLANNED, SMALL, Line

# Of the long names, what `SMALL` already sets is set again.
TRAIN: list[tuple[Line, str]] = [
    (
        "seed=4294967295 trainer.gradient_clip_val=0 trainer.log_every_n_steps=0 trainer.limit_train_batches=1 "
        "trainer.limit_val_batches=1.0 trainer.max_time=00:01:00:00 data.batch_size=1 data.val_batch_size=1 "
        "model.optimizer.weight_decay=0 rule.rate=1 callbacks.checkpoint.monitor=val/dead_experts",
        "runs/small/*/summary.json",
    ),
    (
        "trainer.gradient_clip_val=null trainer.val_check_interval=5 trainer.max_steps=-1 trainer.max_epochs=1 "
        "trainer.limit_train_batches=0.05 trainer.limit_val_batches=0 rule=sign rule.rate=0 router=mixtral "
        "optimized_metric=max_violation_global callbacks.loss_free.sites=*router name=other",
        "runs/other/*/summary.json",
    ),
    (
        "rule=quantile rule.rate=1 trainer.num_sanity_val_steps=-1 trainer.fast_dev_run=1 hydra.run.dir=here",
        "here/config.yaml",
    ),
]
SIMULATE: list[tuple[Line, str]] = [
    (
        "setting.steps=1 setting.num_experts=2 setting.top_k=1 setting.tokens=1 setting.seed=4294967295 "
        "sources.fixed.taste=0 sources.fixed.num_domains=1 sources.bursty.burst=0 rules.sign.rate=1",
        "runs/simulate/rules.png",
    ),
]
PLAN: list[tuple[Line, str]] = [
    ("micro_batch=1 sequence_length=1 layouts=[ep] max_violations=[] output=b.json", "b.json"),
]
REPORT: list[tuple[Line, str]] = [
    ("a=b good x=other/good sweep --out made.html", "made.html"),
    ("cut_short --out made.html", "made.html"),
]
RIGHT: dict[str, tuple[list[str], list[tuple[Line, str]]]] = {
    "moe-train": (SMALL, TRAIN),
    "moe-simulate": ([], SIMULATE),
    "moe-plan": (PLANNED, PLAN),
    "moe-report": ([], REPORT),
}
