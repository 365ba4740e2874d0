"""Checks the figures that the quickstart promises. Usage: check_quickstart.py ROOT."""

import json
import sys
from pathlib import Path

report = json.loads((Path(sys.argv[1]) / "runs" / "quickstart" / "report.json").read_text())
above = report["val_loss"] / report["floor"] - 1
order5 = report["order5_loss"] / report["floor"] - 1
print(f"validation loss {above:+.1%} of the floor (at most +10 %), order-5 model {order5:+.1%} (at least +25 %)")
print(
    f"questions right: {report['accuracy_after']:.1%} after SFT (at least 70 %), {report['accuracy_before']:.1%} before"
)
print("seconds by stage:", {name: round(seconds, 1) for name, seconds in report["seconds"].items()})
failed = []
if above > 0.10 or order5 < 0.25:
    failed.append("validation loss")
if report["accuracy_after"] < 0.70 or report["accuracy_before"] >= 0.10:
    failed.append("accuracy")
for name, row in report["accuracy_by_type"].items():
    print(f"  {name:6} {row['after']:.1%} right, best baseline {row['best_baseline']:.1%}")
    if row["after"] < 1.5 * row["best_baseline"]:
        failed.append(f"accuracy of {name}")
if failed:
    sys.exit(f"missed: {', '.join(failed)}")
