"""Print what each pass of the tests skipped and why, and one closing line of counts over all passes.

Reads the reports that tests/support/skips.py writes. Exits 1 if a report is empty (its pass died) or ran no test.
"""

import json
import sys
from collections import Counter
from pathlib import Path


def main(paths: list[str]) -> int:
    """Print the summary of the named reports."""
    total: Counter[str] = Counter()
    status = 0
    for path in map(Path, paths):
        text = path.read_text() if path.exists() else ""
        if not text:
            print(f"\npass {path.stem}: no report, it did not come to its end")
            status = 1
            continue
        report = json.loads(text)
        counts, skips = report["counts"], report["skips"]
        failed = counts["failed"] + counts["error"]
        total.update(passed=counts["passed"], failed=failed, skipped=len(skips))
        print(f"\npass {path.stem}: {counts['passed']} passed, {failed} failed, {len(skips)} skipped")
        unexpected = {(skip["test"], skip["reason"]) for skip in report["unexpected"]}
        for reason, number in Counter(skip["reason"] for skip in skips).most_common():
            print(f"  {number:5} x {reason}")
            for test in [test for test, why in sorted(unexpected) if why == reason]:
                print(f"          not allowed: {test}")
        if not counts["passed"]:
            status = 1
    print()
    print(f"{total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
