// The table of this instruction set's kernels.
#include "kernels.h"

namespace gptfast::ISA {

#define GPTFAST_DECLARE(name, Args) void name(const Args&, Worker&);
GPTFAST_KERNELS(GPTFAST_DECLARE)
#define GPTFAST_ENTRY(name, Args) name,
extern const Kernels kernels;
const Kernels kernels = {GPTFAST_KERNELS(GPTFAST_ENTRY)};

}  // namespace gptfast::ISA
