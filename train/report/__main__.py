"""python -m train.report"""

from data import DataError
from data.command import run_command
from models import ModelError
from train import TrainError
from train.report.command import report

if __name__ == "__main__":
    run_command(report, prog="python -m train.report", errors=(DataError, ModelError, TrainError))
