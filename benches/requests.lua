-- Asks for the targets of a file in turn, over and over, and prints one line of figures.
--
--   TARGETS=file wrk -t1 -c64 -d5s -s requests.lua URL
local requests, place = {}, 0

function init()
  for target in io.lines(os.getenv("TARGETS")) do
    requests[#requests + 1] = wrk.format("GET", target)
  end
end

function request()
  place = place % #requests + 1
  return requests[place]
end

function done(summary, latency)
  local errors = summary.errors
  io.write(string.format("requests %d micros %d p50 %d p99 %d status %d broken %d\n",
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99),
    errors.status, errors.connect + errors.read + errors.write + errors.timeout))
end
