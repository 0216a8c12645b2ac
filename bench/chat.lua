-- What wrk sends, and its result as one line of JSON. BENCH_BODY is a file, BENCH_KEY goes into the Authorization header.
local file = assert(io.open(os.getenv("BENCH_BODY"), "rb"))
wrk.method = "POST"
wrk.body = file:read("*a")
wrk.headers["Content-Type"] = "application/json"
wrk.headers["Authorization"] = "Bearer " .. os.getenv("BENCH_KEY")
file:close()

function done(summary, latency)
  local e = summary.errors
  print(string.format(
    '{"count": %d, "failed": %d, "wall_s": %.6f, "rate_per_s": %.2f, "p50_ms": %.4f, "p99_ms": %.4f}',
    summary.requests,
    e.connect + e.read + e.write + e.status + e.timeout,
    summary.duration / 1e6,
    summary.requests / (summary.duration / 1e6),
    latency:percentile(50) / 1e3,
    latency:percentile(99) / 1e3
  ))
end
