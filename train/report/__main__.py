"""python -m train.report"""

from command import run_command
from train.report.command import report

if __name__ == "__main__":
    run_command(report, prog="python -m train.report")
