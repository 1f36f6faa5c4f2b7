// Which vector width runs. A build holds the kernels for every width its architecture may have; the CPU decides, and
// SGL_KERNELS_ISA may ask for less. A width that is not to be had cannot stop the library from loading, since its ops
// are registered by then: the widest runs, and `refused_isa` lets Python say so.

#include <cstdlib>
#include <stdexcept>

#include "kernels.h"

namespace sgl {

#define SGL_DECLARE(isa)                                                  \
  namespace isa {                                                         \
  void decode_split(const DecodeArgs&, int64_t, int64_t);                 \
  void decode_combine(const DecodeArgs&, int64_t, int64_t);               \
  void decode_mass(const DecodeArgs&, int64_t, int64_t);                  \
  void prefill_pack(const PrefillArgs&, int64_t, int64_t);                \
  void prefill_denominator(const PrefillArgs&, int64_t, int64_t);         \
  void prefill_rows(const PrefillArgs&, int64_t, int64_t);                \
  void prefill_received(const PrefillArgs&, int64_t, int64_t);            \
  void prefill_mass(const PrefillArgs&, int64_t, int64_t);                \
  void vocab_block(const VocabArgs&, int64_t, int64_t);                   \
  void vocab_finish(const VocabArgs&, int64_t, int64_t);                  \
  void gather_rows(const GatherArgs&, int64_t, int64_t);                  \
  }
#define SGL_TABLE(isa)                                                                                     \
  Kernels{#isa,                isa::decode_split,     isa::decode_combine, isa::decode_mass,               \
          isa::prefill_pack,   isa::prefill_denominator, isa::prefill_rows, isa::prefill_received,         \
          isa::prefill_mass,   isa::vocab_block,      isa::vocab_finish, isa::gather_rows}

SGL_DECLARE(baseline)
#ifdef SGL_X86
SGL_DECLARE(avx2)
SGL_DECLARE(avx512)
#endif

namespace {

std::vector<Kernels> usable_tables() {  // narrowest first
  std::vector<Kernels> tables{SGL_TABLE(baseline)};
#ifdef SGL_X86
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (has_avx2) tables.push_back(SGL_TABLE(avx2));
  if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    tables.push_back(SGL_TABLE(avx512));
#endif
  return tables;
}

const std::vector<Kernels> g_tables = usable_tables();

const Kernels* find(const std::string& name) {
  for (const Kernels& table : g_tables)
    if (name == table.isa) return &table;
  return nullptr;
}

std::string wanted_isa() {
  const char* wanted = std::getenv("SGL_KERNELS_ISA");
  return wanted ? wanted : "";
}

const std::string g_wanted = wanted_isa();
const Kernels* const g_found = find(g_wanted);
const Kernels* g_active = g_found ? g_found : &g_tables.back();

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Kernels& table : g_tables) names.emplace_back(table.isa);
  return names;
}

void set_isa(const std::string& name) {
  if (const Kernels* table = find(name)) {
    g_active = table;
    return;
  }
  std::string have;
  for (const Kernels& table : g_tables) have += std::string(have.empty() ? "" : ", ") + table.isa;
  throw std::invalid_argument("set_isa: the vector width is '" + name + "', expected one of: " + have);
}

std::optional<std::string> refused_isa() {
  if (g_wanted.empty() || g_found) return std::nullopt;
  return g_wanted;
}

const Kernels& active_kernels() { return *g_active; }

std::vector<std::string> cpu_features() {
  std::vector<std::string> found;
#ifdef SGL_X86
#define SGL_FEATURE(name) \
  if (__builtin_cpu_supports(name)) found.emplace_back(name);
  SGL_FEATURE("sse4.2")
  SGL_FEATURE("avx")
  SGL_FEATURE("avx2")
  SGL_FEATURE("fma")
  SGL_FEATURE("f16c")
  SGL_FEATURE("avx512f")
  SGL_FEATURE("avx512bw")
  SGL_FEATURE("avx512dq")
  SGL_FEATURE("avx512vl")
  SGL_FEATURE("avx512bf16")
#endif
  return found;
}

}  // namespace sgl
