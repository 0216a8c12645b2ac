-- All limits of one request at once, by the clock of Redis. The arithmetic is that of policy/rate_limit.py.
--
-- KEYS 1 the tenant's levels, 2 its places, 3 the key's levels, 4 its places; all of one slot. Or 1 the gateways.
-- ARGV 1 what to do: take, settle, renew, seed, count
--      2 bounds: for each its owner (1 tenant, 3 key: where its levels are in KEYS), kind, capacity, rate per second
--      3 amounts by kind
--      4 seconds that a place lasts (take, renew) or a gateway (count); whether the store had said yes (settle); the month (seed)
--      5 whether the request gets a place (take); amounts in full (settle)
--      6 request id (take, settle); from here on all of them (renew); the gateway (count)
-- Lists of numbers come, and the answer goes, as packed doubles.
--
-- Levels are a hash: one field for each kind, `at` for the time of the rates, `month` for that of the budgets. Places
-- are a sorted set of request ids by the time at which they expire, and so are the gateways.

local CONCURRENT, MONTH_TOKENS = 3, 4
local FIELDS = {[0] = 'requests', 'tokens', 'bytes', 'concurrent', 'month-tokens', 'month-money'}
local SLACK = 1e-6
local MONTH_KEPT_S = 40 * 86400
local LEVELS_KEPT_S = 60

local call = redis.call
local time = call('TIME')
local now = time[1] + time[2] / 1e6

local function unpacked(text)
  local values = {struct.unpack('<' .. string.rep('d', #text / 8), text)}
  values[#values] = nil -- where the next one would begin
  return values
end

-- The calendar month in UTC, counted from the year 0. Days are counted from a 1st of March, so that a leap day is
-- the last of its year.
local function month_of(unix_s)
  local days = math.floor(unix_s / 86400) + 719468
  local era = math.floor(days / 146097)
  local day = days - era * 146097
  local year = math.floor(
    (day - math.floor(day / 1460) + math.floor(day / 36524) - math.floor(day / 146096)) / 365)
  local day_of_year = day - (365 * year + math.floor(year / 4) - math.floor(year / 100))
  return (era * 400 + year) * 12 + math.floor((5 * day_of_year + 2) / 153) + 2
end

local this_month

local function month()
  this_month = this_month or month_of(now)
  return this_month
end

local function month_left_s()
  local day = math.floor(now / 86400) + 1
  while month_of(day * 86400) == month() do
    day = day + 1
  end
  return day * 86400 - now
end

local owners = {} -- what is stored of each, read once

local function owner_at(place)
  if not owners[place] then
    local stored = call('HMGET', KEYS[place], 'at', 'month', FIELDS[0], FIELDS[1], FIELDS[2], FIELDS[4], FIELDS[5])
    local elapsed = now - (tonumber(stored[1]) or now)
    if elapsed < 0 then -- the clock was set back: from here on time counts again
      call('HSET', KEYS[place], 'at', string.format('%.6f', now))
    end
    local is_this_month = stored[2] and tonumber(stored[2]) == month()
    owners[place] = {
      elapsed = math.max(0, elapsed),
      levels = {
        [0] = tonumber(stored[3]) or 0,
        tonumber(stored[4]) or 0,
        tonumber(stored[5]) or 0,
        0,
        is_this_month and tonumber(stored[6]) or 0,
        is_this_month and tonumber(stored[7]) or 0,
      },
      kept_s = 0,
      changed = {},
    }
  end
  return owners[place]
end

-- The level of a bound now; rates fall by it, once, as long as nobody asks twice.
local function level_of(bound)
  if bound.kind == CONCURRENT then
    call('ZREMRANGEBYSCORE', KEYS[bound.owner + 1], '-inf', now)
    return call('ZCARD', KEYS[bound.owner + 1])
  end
  local owner = owner_at(bound.owner)
  return math.max(0, owner.levels[bound.kind] - owner.elapsed * bound.per_s)
end

local function set_level(bound, level)
  if bound.kind == CONCURRENT then
    return
  end
  local owner = owner_at(bound.owner)
  local changed = owner.changed
  changed[#changed + 1] = FIELDS[bound.kind]
  changed[#changed + 1] = string.format('%.17g', level)
  if bound.kind >= MONTH_TOKENS then
    owner.has_budget = true
    owner.kept_s = MONTH_KEPT_S
  else
    owner.has_rate = true
    owner.kept_s = math.max(owner.kept_s, level / bound.per_s + LEVELS_KEPT_S)
  end
end

local function save()
  for place, owner in pairs(owners) do
    local changed = owner.changed
    if owner.has_rate then
      changed[#changed + 1] = 'at'
      changed[#changed + 1] = string.format('%.6f', now)
    end
    if owner.has_budget then
      changed[#changed + 1] = 'month'
      changed[#changed + 1] = month()
    end
    if #changed > 0 then
      call('HSET', KEYS[place], unpack(changed))
      call('EXPIRE', KEYS[place], math.ceil(math.min(owner.kept_s, MONTH_KEPT_S)))
    end
  end
end

local function bounds_in(text)
  local values, bounds = unpacked(text), {}
  for first = 1, #values, 4 do
    bounds[#bounds + 1] =
      {owner = values[first], kind = values[first + 1], capacity = values[first + 2], per_s = values[first + 3]}
  end
  return bounds
end

local function get_place(place, id, lasts_s)
  call('ZADD', KEYS[place], now + lasts_s, id)
  call('EXPIRE', KEYS[place], math.ceil(lasts_s))
end

local function take(bounds, amounts, lasts_s, has_place, id)
  local answer, levels, has_budget = {1, 0}, {}, false
  for i, bound in ipairs(bounds) do
    local level = level_of(bound)
    local needed = amounts[bound.kind + 1]
    if bound.per_s > 0 then
      needed = math.min(needed, bound.capacity)
    elseif bound.kind >= MONTH_TOKENS then
      has_budget = true
    end
    if level + needed > bound.capacity + SLACK then
      answer[1] = 0
    end
    answer[i + 2] = level
    levels[i] = level
  end
  if has_budget then
    answer[2] = month_left_s()
  end
  if answer[1] == 1 then
    for i, bound in ipairs(bounds) do
      set_level(bound, levels[i] + amounts[bound.kind + 1])
      if bound.kind == CONCURRENT and bound.owner == 3 then
        get_place(4, id, lasts_s)
      end
    end
    save()
    if has_place then
      get_place(2, id, lasts_s)
    end
  end
  return struct.pack('<' .. string.rep('d', #answer), unpack(answer))
end

-- What has a place is corrected; what has none was never taken, or its place has expired and its estimate stands.
local function settle(bounds, corrections, was_taken, in_full, id)
  local had_place = call('ZREM', KEYS[2], id) + call('ZREM', KEYS[4], id) > 0
  if not had_place and was_taken then
    return
  end
  local amounts = had_place and corrections or in_full
  for _, bound in ipairs(bounds) do
    if bound.kind ~= CONCURRENT then -- all of them, for they share the time
      set_level(bound, math.max(0, level_of(bound) + amounts[bound.kind + 1]))
    end
  end
  save()
end

local function renew(lasts_s)
  for i = 6, #ARGV do
    call('ZADD', KEYS[2], 'XX', now + lasts_s, ARGV[i])
    call('ZADD', KEYS[4], 'XX', now + lasts_s, ARGV[i])
  end
  call('EXPIRE', KEYS[2], math.ceil(lasts_s))
  call('EXPIRE', KEYS[4], math.ceil(lasts_s))
end

local function seed(amounts, of_month)
  if of_month ~= month() then
    return
  end
  for kind = MONTH_TOKENS, MONTH_TOKENS + 1 do
    local bound = {owner = 1, kind = kind, per_s = 0}
    set_level(bound, math.max(level_of(bound), amounts[kind + 1]))
  end
  save()
end

-- How many gateways are alive, this one too.
local function count(lasts_s, gateway)
  get_place(1, gateway, lasts_s)
  call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
  return call('ZCARD', KEYS[1])
end

local what = ARGV[1]
if what == 'take' then
  return take(bounds_in(ARGV[2]), unpacked(ARGV[3]), tonumber(ARGV[4]), ARGV[5] == '1', ARGV[6])
elseif what == 'settle' then
  settle(bounds_in(ARGV[2]), unpacked(ARGV[3]), ARGV[4] == '1', unpacked(ARGV[5]), ARGV[6])
elseif what == 'renew' then
  renew(tonumber(ARGV[4]))
elseif what == 'count' then
  return count(tonumber(ARGV[4]), ARGV[6])
else
  seed(unpacked(ARGV[3]), tonumber(ARGV[4]))
end
