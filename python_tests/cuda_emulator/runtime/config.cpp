#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <cstring>
#include <string>

#include "worker.h"

namespace emulator {

namespace {

template <class T>
bool parse(const char* value, T least, T most, T& setting) {
  char* end;
  const long long number = strtoll(value, &end, 10);
  const bool good =
      end != value && !*end && number >= (long long)least && number <= (long long)most;
  if (good) setting = T(number);
  return good;
}

bool parse_order(const char* value, std::initializer_list<const char*> names, Order& order) {
  const auto found = std::find_if(names.begin(), names.end(),
                                  [&](const char* name) { return !strcmp(name, value); });
  if (found != names.end()) order = Order(found - names.begin());
  return found != names.end();
}

struct Setting {
  const char* name;
  bool (*set)(Config&, const char*);
};
constexpr Setting kSettings[] = {
    {"resident_blocks",
     [](Config& c, const char* v) { return parse(v, 1, 64, c.resident_blocks); }},
    {"thread_order",
     [](Config& c, const char* v) {
       return parse_order(v, {"forward", "reversed", "shuffled"}, c.thread_order);
     }},
    {"block_order",
     [](Config& c, const char* v) {
       return parse_order(v, {"forward", "reversed"}, c.block_order);
     }},
    {"seed", [](Config& c, const char* v) { return parse<uint64_t>(v, 0, INT64_MAX, c.seed); }},
    {"shared_bytes",
     [](Config& c, const char* v) {
       return parse<size_t>(v, 0, Worker::kMostShared, c.shared_bytes);
     }},
    {"poll_limit",
     [](Config& c, const char* v) { return parse<int64_t>(v, 1, INT64_MAX, c.poll_limit); }},
    {"hang_seconds",
     [](Config& c, const char* v) { return parse(v, 0, INT32_MAX, c.hang_seconds); }},
};

Config from_environment() {
  Config result;
  for (const Setting& setting : kSettings) {
    std::string name = std::string("CUDA_EMULATOR_") + setting.name;
    std::transform(name.begin(), name.end(), name.begin(), toupper);
    const char* value = getenv(name.c_str());
    if (value && !setting.set(result, value))
      fail(nullptr, text("%s=%s is not understood", name.c_str(), value));
  }
  return result;
}

}  // namespace

Config config = from_environment();

bool configure(const char* name, const char* value) {
  for (const Setting& setting : kSettings)
    if (!strcmp(setting.name, name)) return setting.set(config, value);
  return false;
}

}  // namespace emulator

// For ctypes: 0, or -1 if there is no such name or value.
extern "C" [[gnu::visibility("default")]] int emulator_configure(const char* name,
                                                                 const char* value) {
  return emulator::configure(name, value) ? 0 : -1;
}
