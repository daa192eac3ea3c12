// PyTorch's OpenMP threads beside ours. After each parallel op they spin for 3 ms and more on the cores that our team's
// threads want next. So they sleep while kernels run on our team; or kernels that come between many of PyTorch's ops,
// as a patched model's do, run on them.
#pragma once

namespace gptfast {

// Calls body(args) in `threads` threads of PyTorch's, the caller among them, or fewer. False, with nothing done, unless
// join_pytorch(true) was called last; where there is no libgomp that spins as it does by default; and in the child of a
// fork, where its threads are gone.
bool run_on_pytorch(void (*body)(void*), void* args, int threads);

// To be called when a launch on the team begins. From then until about 40 ms after the last call libgomp's idle threads
// sleep at once, for a process whose threads are more than its cores; see openmp.cpp. It does nothing where PyTorch
// isn't loaded or has another runtime than libgomp, where the environment says how to wait (OMP_WAIT_POLICY,
// GOMP_SPINCOUNT), or in the child of a fork.
void share_cores();

bool shares_cores();   // whether they sleep now
void let_share(bool);  // false: share_cores() does nothing from now on
void join_pytorch(bool);
}  // namespace gptfast
