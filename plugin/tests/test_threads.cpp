// The engine's threads wait for each other: nobody goes on before all are there, nobody sleeps on, with more threads than cores, with
// threads that come late, with graphs that use some of a pool, and in a forked child.
#include "check.h"
#include "ggml-cpu.h"
#include "ggml.h"

#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <vector>

namespace {

constexpr int N_STEPS = 500; // of a graph; a barrier after each
constexpr int LATE_US = 300; // longer than anybody spins

// What all threads of a step have left for the next one. Not atomic: barriers alone make it safe, which TSan checks.
struct marks {
    std::array<std::vector<int>, 2> of; // of even and odd steps, by thread
};

struct step {
    int     number = 0;
    int     late   = -1; // thread that keeps the others waiting
    marks * all    = nullptr;
};

void run_step(ggml_tensor * dst, const ggml_tensor * src, int ith, int nth, void * data) {
    const step & s = *(const step *) data;
    if (s.number > 0) {
        for (int j = 0; j < nth; j++) {
            const int mark = s.all->of[(size_t) (s.number - 1) % 2][(size_t) j];
            CHECK(mark == s.number - 1, "thread %d of %d is at step %d, thread %d at %d", ith, nth, s.number, j, mark);
        }
    }
    if (s.late == ith) {
        usleep(LATE_US);
    }
    s.all->of[(size_t) s.number % 2][(size_t) ith] = s.number;
    (void) dst;
    (void) src;
}

class long_graph {
  public:
    long_graph() : ctx(ggml_init({ (size_t) N_STEPS * 1024 + ggml_graph_overhead_custom(N_STEPS, false), nullptr, false })), steps((size_t) N_STEPS) {
        graph           = ggml_new_graph_custom(ctx, N_STEPS, false);
        ggml_tensor * t = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, 1);
        for (int i = 0; i < N_STEPS; i++) {
            steps[(size_t) i] = { i, -1, &all };
            t                 = ggml_map_custom1(ctx, t, run_step, GGML_N_TASKS_MAX, &steps[(size_t) i]);
        }
        ggml_build_forward_expand(graph, t);
    }

    ~long_graph() { ggml_free(ctx); }

    void compute(ggml_threadpool * pool, int n_threads, random_source & random) {
        all.of.fill(std::vector<int>((size_t) n_threads, -1));
        for (step & s : steps) {
            s.late = random.below(200) == 0 ? (int) random.below((uint64_t) n_threads) : -1;
        }
        ggml_cplan           plan = ggml_graph_plan(graph, n_threads, pool);
        std::vector<uint8_t> work(plan.work_size);
        plan.work_data = work.data();
        CHECK(ggml_graph_compute(graph, &plan) == GGML_STATUS_SUCCESS, "%d threads", n_threads);
        for (int mark : all.of[(N_STEPS - 1) % 2]) {
            CHECK(mark == N_STEPS - 1, "the graph has ended with a thread at step %d", mark);
        }
    }

  private:
    ggml_context *    ctx;
    ggml_cgraph *     graph;
    marks             all;
    std::vector<step> steps;
};

ggml_threadpool * make_pool(int n_threads) {
    ggml_threadpool_params params = ggml_threadpool_params_default(n_threads);
    return ggml_threadpool_new(&params);
}

void nobody_goes_on_alone(int n_threads, int n_graphs) {
    random_source     random((uint64_t) n_threads);
    long_graph        graph;
    ggml_threadpool * pool = make_pool(n_threads);
    for (int i = 0; i < n_graphs; i++) {
        if (random.chance(20)) {
            usleep(LATE_US); // the pool's threads sleep until the next graph
        }
        graph.compute(pool, random.chance(80) ? n_threads : 1 + (int) random.below((uint64_t) n_threads), random);
    }
    ggml_threadpool_free(pool);
}

void a_child_has_threads_of_its_own() {
    random_source     random(1);
    long_graph        graph;
    ggml_threadpool * pool  = make_pool(3);
    ggml_threadpool * other = make_pool(3);
    graph.compute(pool, 3, random);
    for (int i = 0; i < 5; i++) {
        const pid_t child = fork();
        if (child == 0) {
            ggml_threadpool_free(other); // unused: nobody is waited for
            graph.compute(pool, 3, random);
            graph.compute(pool, 2, random);
            ggml_threadpool_free(pool);
            _exit(0);
        }
        int status = 0;
        CHECK(waitpid(child, &status, 0) == child && status == 0, "the child ended with %d", status);
        graph.compute(pool, 3, random);
    }
    ggml_threadpool_free(pool);
    ggml_threadpool_free(other);
}

} // namespace

int main() {
    ggml_cpu_init();
#if !defined(__SANITIZE_THREAD__) // which does not follow threads that a child starts
    a_child_has_threads_of_its_own();
#endif
    nobody_goes_on_alone(2, 100);
    nobody_goes_on_alone(3, 60);
    nobody_goes_on_alone(5, 30);
    nobody_goes_on_alone(9, 10); // 100,000 barriers in all
    return 0;
}
