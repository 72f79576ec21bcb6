"""The command line with the stand-in for the simulating process: `run_stand_in_predict.py ARGV`."""

from __future__ import annotations

from launch import entry
from launch.predict import predict

if __name__ == "__main__":
    predict.SIMULATE = "stand_in_simulate"
    entry.main()
