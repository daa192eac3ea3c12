// How PyTorch's idle threads wait while ours work. After each parallel op its OpenMP threads spin for 3 ms on the cores
// that our team's threads want next.
#pragma once

namespace gptfast {

// To be called when a launch on the team begins. From then until about 40 ms after the last call libgomp's idle threads
// sleep at once, for a process whose threads are more than its cores; see openmp.cpp. It does nothing where PyTorch
// isn't loaded or has another runtime than libgomp, where the environment says how to wait (OMP_WAIT_POLICY,
// GOMP_SPINCOUNT), or in the child of a fork.
void share_cores();

bool shares_cores();   // whether they sleep now
void let_share(bool);  // false: share_cores() does nothing from now on
}  // namespace gptfast
