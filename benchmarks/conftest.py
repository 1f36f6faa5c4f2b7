"""After a pytest-benchmark run: what each target asked for and what was reached."""

from collections import defaultdict

from benchmarks.cases import Target


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    medians, targets = defaultdict(dict), {}
    for benchmark in getattr(session, "benchmarks", []):
        if benchmark.stats and "side" in benchmark.extra_info:
            medians[benchmark.group][benchmark.extra_info["side"]] = benchmark.stats.median * 1e6
            targets[benchmark.group] = benchmark.extra_info["targets"]
    if not medians:
        return
    terminalreporter.section("targets")
    for group, sides in medians.items():
        for baseline, words, factor, slack_us in targets[group]:
            if "ours" in sides and baseline in sides:
                met = Target(baseline, factor, slack_us).met(sides["ours"], sides[baseline])
                ratio = sides[baseline] / sides["ours"]
                terminalreporter.line(f"{'met   ' if met else 'MISSED'} {ratio:6.2f}x  {group}: {words}")
