"""The command line with the stand-in for the simulating process: `run_stand_in_predict.py ARGV`."""

from __future__ import annotations

from launch import cli, predicting

if __name__ == "__main__":
    predicting.SIMULATE = "stand_in_simulate"
    cli.main()
