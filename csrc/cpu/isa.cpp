#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace ppok {
namespace {

std::vector<const KernelTable*> runnable() {
  std::vector<const KernelTable*> tables{&table_generic};
#ifdef PPOK_HAS_AVX2
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (avx2) tables.push_back(&table_avx2);
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    tables.push_back(&table_avx512);
#endif
  return tables;
}

const KernelTable* find(const std::string& name) {
  std::string known;
  for (const KernelTable* table : runnable()) {
    if (name == table->isa) return table;
    known += std::string(known.empty() ? "" : ", ") + table->isa;
  }
  throw std::invalid_argument("instruction set '" + name + "' cannot run here: expected one of " +
                              known);
}

const KernelTable* initial() {
  const char* wanted = std::getenv("PPO_KERNELS_CPU_ISA");
  return wanted && *wanted ? find(wanted) : runnable().back();
}

std::atomic<const KernelTable*> current{nullptr};

}  // namespace

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const KernelTable* table : runnable()) names.push_back(table->isa);
  return names;
}

const KernelTable& active() {
  const KernelTable* table = current.load(std::memory_order_acquire);
  if (!table) {
    table = initial();
    current.store(table, std::memory_order_release);
  }
  return *table;
}

void set_isa(const std::string& name) { current.store(find(name), std::memory_order_release); }

bool is_intel() {
#ifdef PPOK_HAS_AVX2
  __builtin_cpu_init();
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

}  // namespace ppok
