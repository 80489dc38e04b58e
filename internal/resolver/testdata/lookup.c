/*
 * lookup: resolves names as programs do, by getaddrinfo of the C library.
 *
 *   lookup THREADS FORMAT
 *
 * Thread i looks up FORMAT with %d replaced by i; all begin at the same time.
 * Prints the failures, then "N failed of M, slowest S.SSS s" and the first
 * thread's addresses.
 */
#include <arpa/inet.h>
#include <netdb.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

static const char *format;
static pthread_barrier_t start;

struct lookup {
	pthread_t thread;
	int number, error;
	double took;
	char addresses[512];
};

static double now(void) {
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

static void *run(void *arg) {
	struct lookup *l = arg;
	char name[256];
	struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found = NULL;
	snprintf(name, sizeof name, format, l->number);
	pthread_barrier_wait(&start);
	double began = now();
	l->error = getaddrinfo(name, NULL, &hints, &found);
	l->took = now() - began;
	for (struct addrinfo *a = found; a && l->error == 0; a = a->ai_next) {
		char text[INET6_ADDRSTRLEN];
		void *addr = a->ai_family == AF_INET ? (void *)&((struct sockaddr_in *)a->ai_addr)->sin_addr
		                                     : (void *)&((struct sockaddr_in6 *)a->ai_addr)->sin6_addr;
		inet_ntop(a->ai_family, addr, text, sizeof text);
		if (strlen(l->addresses) + strlen(text) + 2 < sizeof l->addresses)
			strcat(strcat(l->addresses, " "), text);
	}
	if (found)
		freeaddrinfo(found);
	return NULL;
}

int main(int argc, char **argv) {
	int n = argc == 3 ? atoi(argv[1]) : 0;
	if (n < 1 || n > 1000) {
		fprintf(stderr, "usage: lookup THREADS FORMAT\n");
		return 2;
	}
	format = argv[2];
	struct lookup *all = calloc(n, sizeof *all);
	pthread_barrier_init(&start, NULL, n);
	for (int i = 0; i < n; i++) {
		all[i].number = i;
		if (pthread_create(&all[i].thread, NULL, run, &all[i]) != 0) {
			perror("pthread_create");
			return 2;
		}
	}
	int failed = 0;
	double slowest = 0;
	for (int i = 0; i < n; i++) {
		pthread_join(all[i].thread, NULL);
		if (all[i].took > slowest)
			slowest = all[i].took;
		if (all[i].error != 0) {
			failed++;
			printf("thread %d: %s\n", i, gai_strerror(all[i].error));
		}
	}
	printf("%d failed of %d, slowest %.3f s%s\n", failed, n, slowest, all[0].addresses);
	return failed != 0;
}
