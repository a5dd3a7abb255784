// Threads that count, wait for their turn, and end in different ways. The only argument says what.
#define _GNU_SOURCE
#include <pthread.h>
#include <semaphore.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { kThreads = 8, kRounds = 20000 };

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static long total, turn;
static __thread long own;
static sem_t ready;

static void* count(void* argument) {
    const long number = (long)argument;
    for (int n = 0; n < kRounds; ++n) {
        pthread_mutex_lock(&mutex);
        ++total;
        pthread_mutex_unlock(&mutex);
        ++own;
    }
    pthread_mutex_lock(&mutex);
    while (turn != number) pthread_cond_wait(&changed, &mutex);
    ++turn;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&mutex);
    return (void*)(number * number + own);
}

static int counting(void) {
    pthread_t threads[kThreads];
    long sum = 0;
    for (long n = 0; n < kThreads; ++n) pthread_create(&threads[n], NULL, count, (void*)n);
    for (int n = 0; n < kThreads; ++n) {
        void* result;
        pthread_join(threads[n], &result);
        sum += (long)result;
    }
    printf("%ld %ld %ld\n", total, turn, sum);
    return 0;
}

static int timed_out(void) {
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_nsec += 50000000;
    if (until.tv_nsec >= 1000000000) ++until.tv_sec, until.tv_nsec -= 1000000000;
    pthread_mutex_lock(&mutex);
    printf("%s\n", strerror(pthread_cond_timedwait(&changed, &mutex, &until)));
    return 0;
}

static void* sleeps(void* argument) {
    sem_post(&ready);
    sleep(1000);
    return argument;
}

static void* spins(void* argument) {
    sem_post(&ready);
    for (volatile long n = 0;; ++n) {
    }
    return argument;
}

static void* executes(void* argument) {
    execl("/bin/echo", "echo", getpid() == syscall(SYS_gettid) ? "leader" : "thread", NULL);
    return argument;
}

static void* exits(void* argument) {
    exit(7);
    return argument;
}

static void* waits_for_main(void* argument) {
    pthread_join(*(pthread_t*)argument, NULL);
    puts("after main");
    exit(8);
}

int main(int count_of, char** arguments) {
    const char* what = count_of > 1 ? arguments[1] : "count";
    pthread_t thread, self = pthread_self();
    sem_init(&ready, 0, 0);
    if (!strcmp(what, "count")) return counting();
    if (!strcmp(what, "timeout")) return timed_out();
    if (!strcmp(what, "main-exits")) {
        pthread_create(&thread, NULL, waits_for_main, &self);
        pthread_exit(NULL);
    }
    pthread_create(&thread, NULL, sleeps, NULL);
    pthread_create(&thread, NULL, spins, NULL);
    sem_wait(&ready);
    sem_wait(&ready);
    if (!strcmp(what, "exit")) return 6;
    if (!strcmp(what, "crash")) return *(volatile int*)8;
    pthread_create(&thread, NULL, !strcmp(what, "execute") ? executes : exits, NULL);
    for (volatile long n = 0;; ++n) {
    }
}
