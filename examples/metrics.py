"""How many drafts are accepted, from /metrics of a server started with --enable-metrics that has answered something."""

import sys
from collections import Counter

import httpx
from prometheus_client.parser import text_string_to_metric_families

url = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:30000"
text = httpx.get(f"{url}/metrics", follow_redirects=True).raise_for_status().text
counts, seconds, by_depth = Counter[str](), Counter[str](), Counter[int]()
for sample in (s for family in text_string_to_metric_families(text) for s in family.samples):
    counts[sample.name] += sample.value
    if sample.name == "sglang:dflash_accepted_drafts_total":
        by_depth[int(sample.labels["depth"])] += sample.value
    if sample.name == "sglang:dflash_step_seconds_total":
        seconds[sample.labels["part"]] += sample.value
steps = counts["sglang:dflash_steps_total"]
if not steps:
    sys.exit(f"{url} has drafted nothing yet, or was started without --enable-metrics")
print(f"trees of {counts['sglang:dflash_tree_nodes']:.0f} nodes, {steps:.0f} steps")
print(f"accept length {1 + by_depth.total() / steps:.2f}")
for depth, accepted in sorted(by_depth.items()):
    print(f"  depth {depth:2}: accepted in {accepted / steps:4.0%} of steps")
print("time: " + ", ".join(f"{part} {value / seconds.total():.0%}" for part, value in seconds.items()))
