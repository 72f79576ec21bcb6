"""The `tunebench` command with stand-ins for worker, preflight and simulation:
`run_stand_in_cli.py ARGV`. `STAND_IN_IMPORT_SECONDS` is what importing the stack takes."""

from __future__ import annotations

from functools import partial

from launch import entry

run = entry._run


def with_stand_ins() -> int:
    from launch.cells import runner
    from launch.predict import predict

    predict.SIMULATE = "stand_in_simulate"
    runner.Runner = partial(  # type: ignore[assignment,misc]
        runner.Runner, worker="stand_in_worker", preflight="stand_in_worker"
    )
    return run()


if __name__ == "__main__":
    entry._run = with_stand_ins
    entry.main()
