// One table of kernels per instruction set; this file, like every kernel file, is compiled once for
// each.
#include "kernels.h"

#define PPOK_CAT_(a, b) a##b
#define PPOK_CAT(a, b) PPOK_CAT_(a, b)

namespace ppok {
namespace PPOK_ISA {
#define PPOK_DECLARE(name, Args) Fault name(const Args&);
PPOK_KERNELS(PPOK_DECLARE)
#undef PPOK_DECLARE
}  // namespace PPOK_ISA

#define PPOK_STRING_(a) #a
#define PPOK_STRING(a) PPOK_STRING_(a)
#define PPOK_ENTRY(name, Args) PPOK_ISA::name,
extern const KernelTable PPOK_CAT(table_, PPOK_ISA);
const KernelTable PPOK_CAT(table_, PPOK_ISA) = {PPOK_STRING(PPOK_ISA), PPOK_KERNELS(PPOK_ENTRY)};

}  // namespace ppok
