/* The network between the hosts of a lab, in one process and without kernel modules.
 *
 *     hub HOSTS < commands
 *
 * Makes HOSTS network namespaces, each with the one interface eth0 (a TUN device, 10.77.0.1 and up), and carries IPv4
 * packets between them with delay, rate and loss. Nothing of it has a name in the file system: when the hub ends, it
 * kills what still runs in the namespaces, and with that they are gone. It ends when its input does, so it cannot
 * outlive the program that started it.
 *
 * Says "ready REALTIME FD FD ..." (whether it has real-time priority; descriptors of the namespaces by host), then
 * reads commands, one a line, and answers each with "ok" or "error ...". Hosts are numbers from 0; a value of "-" unsets.
 *     access H DELAY_MS RATE_MBIT LOSS_PERCENT   host H's own link: its traffic with every host
 *     delay A B MS | rate A B MBIT | loss A B PERCENT    of packets from A to B only, instead of what access says
 *     cut A B      drops everything from A to B
 *     down H       drops everything from and to H
 *     up H         ends that
 *     heal         ends all cuts, and all hosts are up
 * A rate of 0 is no limit. Without a value of its own, a pair has the sum of both access delays, and both losses.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <math.h>
#include <net/if.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

enum { MAX_HOSTS = 64, MAX_PACKET = 2048, MTU = 1500, BURST = 64, TIMER = 1000, COMMANDS = 1001 };

/* Who sends faster than a link's rate fills its buffer; beyond 200 ms of backlog packets are dropped. */
static const uint64_t BUFFER_NS = 200000000;

/* A place where packets wait for each other: one bit after the other at `ns_per_byte`. */
typedef struct {
    double ns_per_byte;
    uint64_t free_at;
} Queue;

typedef struct {
    int tun, namespace;
    bool up;
    double delay_ns, loss;
    Queue out, in;
} Host;

typedef struct {
    bool cut;
    double delay_ns, loss, rate_mbit; /* NAN: as the two hosts' access links say */
    Queue queue;
} Pair;

typedef struct {
    uint64_t due, order;
    int from, to, length;
    bool received; /* it is through the receiver's own link */
    unsigned char *bytes;
} Packet;

static int hosts;
static Host host[MAX_HOSTS];
static Pair pair[MAX_HOSTS][MAX_HOSTS];

/* Packets under way, a heap with the earliest on top. */
static Packet *heap;
static size_t under_way, heap_size;
static uint64_t sent;

static void kill_all(void);

static void fail(const char *what) {
    printf("error %s: %s\n", what, strerror(errno));
    kill_all();
    exit(1);
}

static uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000ull + now.tv_nsec;
}

static bool earlier(const Packet *a, const Packet *b) {
    return a->due < b->due || (a->due == b->due && a->order < b->order);
}

static void swap(size_t a, size_t b) {
    Packet packet = heap[a];
    heap[a] = heap[b];
    heap[b] = packet;
}

static void push(Packet packet) {
    if (under_way == heap_size) {
        heap_size = heap_size ? 2 * heap_size : 1024;
        heap = realloc(heap, heap_size * sizeof *heap);
        if (!heap) fail("memory");
    }
    size_t i = under_way++;
    heap[i] = packet;
    for (; i && earlier(&heap[i], &heap[(i - 1) / 2]); i = (i - 1) / 2) swap(i, (i - 1) / 2);
}

static Packet pop(void) {
    Packet top = heap[0];
    heap[0] = heap[--under_way];
    for (size_t i = 0;;) {
        size_t least = i;
        for (size_t child = 2 * i + 1; child <= 2 * i + 2; child++)
            if (child < under_way && earlier(&heap[child], &heap[least])) least = child;
        if (least == i) return top;
        swap(i, least);
        i = least;
    }
}

/* When a packet that reaches a queue at `at` has left it; 0 if the queue is full. */
static uint64_t through(Queue *queue, uint64_t at, int length) {
    if (queue->ns_per_byte == 0) return at;
    uint64_t start = at > queue->free_at ? at : queue->free_at;
    if (start - at > BUFFER_NS) return 0;
    return queue->free_at = start + (uint64_t)(length * queue->ns_per_byte);
}

static bool connected(int from, int to) { return host[from].up && host[to].up && !pair[from][to].cut; }

static void send_packet(int from, const unsigned char *bytes, int length) {
    /* IPv4 to 10.77.0.1 and up only; the kernels also say things in IPv6. */
    if (length < 20 || bytes[0] >> 4 != 4 || memcmp(bytes + 16, "\x0a\x4d\x00", 3)) return;
    int to = bytes[19] - 1;
    if (to < 0 || to >= hosts || to == from || !connected(from, to)) return;
    Pair *own = &pair[from][to];
    double loss = isnan(own->loss) ? 1 - (1 - host[from].loss) * (1 - host[to].loss) : own->loss;
    if (loss > 0 && drand48() < loss) return;
    uint64_t gone = through(isnan(own->rate_mbit) ? &host[from].out : &own->queue, now_ns(), length);
    if (!gone) return;
    double delay = isnan(own->delay_ns) ? host[from].delay_ns + host[to].delay_ns : own->delay_ns;
    Packet packet = {gone + (uint64_t)delay, sent++, from, to, length, !isnan(own->rate_mbit), malloc(length)};
    if (!packet.bytes) fail("memory");
    memcpy(packet.bytes, bytes, length);
    push(packet);
}

/* The receiver's link takes packets as they arrive, so it is asked then: their senders are at different distances. */
static void deliver_due(void) {
    while (under_way && heap[0].due <= now_ns()) {
        Packet packet = pop();
        bool kept = connected(packet.from, packet.to);
        if (kept && !packet.received) {
            packet.received = true;
            uint64_t arrived = packet.due;
            /* The sender's link has spread the packets out already; an idle receiver does not do so again. */
            Queue *in = &host[packet.to].in;
            if (in->free_at <= arrived) {
                in->free_at = arrived + (uint64_t)(packet.length * in->ns_per_byte);
            } else if ((packet.due = through(in, arrived, packet.length)) > arrived) {
                push(packet);
                continue;
            } else {
                kept = packet.due != 0;
            }
        }
        /* A full receiver drops, as a network card does. */
        if (kept && write(host[packet.to].tun, packet.bytes, packet.length) < 0 && errno != EAGAIN && errno != ENOBUFS)
            fail("write to a host");
        free(packet.bytes);
    }
}

static double ns_per_byte(double mbit) { return mbit > 0 ? 8000 / mbit : 0; }

/* A number at least 0, or NAN for "-"; false if it is neither. */
static bool number(const char *text, double *value) {
    char *end;
    *value = strcmp(text, "-") ? strtod(text, &end) : NAN;
    return !strcmp(text, "-") || (end != text && !*end && *value >= 0 && isfinite(*value));
}

static const char *obey(char *line) {
    char word[5][32] = {{0}};
    int words = sscanf(line, "%31s %31s %31s %31s %31s", word[0], word[1], word[2], word[3], word[4]);
    const char *what = word[0];
    int a = words > 1 && isdigit(*word[1]) ? atoi(word[1]) : -1;
    int b = words > 2 && isdigit(*word[2]) ? atoi(word[2]) : -1;
    bool one = a >= 0 && a < hosts, two = one && b >= 0 && b < hosts && a != b;
    double value[3] = {0};
    if (words == 1 && !strcmp(what, "heal")) {
        for (int i = 0; i < hosts; i++) {
            host[i].up = true;
            for (int j = 0; j < hosts; j++) pair[i][j].cut = false;
        }
    } else if (words == 2 && one && (!strcmp(what, "up") || !strcmp(what, "down"))) {
        host[a].up = !strcmp(what, "up");
    } else if (words == 3 && two && !strcmp(what, "cut")) {
        pair[a][b].cut = true;
    } else if (words == 5 && one && !strcmp(what, "access")) {
        for (int i = 0; i < 3; i++)
            if (!number(word[2 + i], &value[i]) || isnan(value[i])) return "an access link needs numbers";
        host[a].delay_ns = value[0] * 1e6;
        host[a].out.ns_per_byte = host[a].in.ns_per_byte = ns_per_byte(value[1]);
        host[a].loss = value[2] / 100;
    } else if (words == 4 && two && number(word[3], &value[0])) {
        Pair *own = &pair[a][b];
        if (!strcmp(what, "delay")) {
            own->delay_ns = value[0] * 1e6;
        } else if (!strcmp(what, "loss")) {
            own->loss = value[0] / 100;
        } else if (!strcmp(what, "rate")) {
            own->rate_mbit = value[0];
            own->queue.ns_per_byte = isnan(value[0]) ? 0 : ns_per_byte(value[0]);
        } else {
            return "no such command";
        }
    } else {
        return "no such command, or no such host";
    }
    return NULL;
}

/* Obeys the complete lines that came; false at the end of the input. */
static bool read_commands(void) {
    static char text[4096];
    static size_t length;
    ssize_t count = read(STDIN_FILENO, text + length, sizeof text - 1 - length);
    if (count <= 0) return count < 0 && (errno == EAGAIN || errno == EINTR);
    length += count;
    text[length] = 0;
    char *line = text;
    for (char *end; (end = strchr(line, '\n')); line = end + 1) {
        *end = 0;
        const char *error = obey(line);
        if (error) printf("error %s: %s\n", error, line);
        else printf("ok\n");
    }
    length -= line - text;
    memmove(text, line, length);
    return length < sizeof text - 1;
}

static void configure(int i) {
    int control = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    struct ifreq request = {.ifr_name = "eth0", .ifr_mtu = MTU};
    struct sockaddr_in *address = (struct sockaddr_in *)&request.ifr_addr;
    if (control < 0 || ioctl(control, SIOCSIFMTU, &request)) fail("set the MTU");
    memset(&request.ifr_ifru, 0, sizeof request.ifr_ifru);
    request.ifr_qlen = 1000;
    ioctl(control, SIOCSIFTXQLEN, &request); /* more than the usual 500 for bursts; refused in a user namespace */
    memset(&request.ifr_ifru, 0, sizeof request.ifr_ifru);
    address->sin_family = AF_INET;
    address->sin_addr.s_addr = htonl(0x0a4d0001 + i); /* 10.77.0.1 */
    if (ioctl(control, SIOCSIFADDR, &request)) fail("set the address");
    address->sin_addr.s_addr = htonl(0xffffff00);
    if (ioctl(control, SIOCSIFNETMASK, &request)) fail("set the netmask");
    for (int loopback = 0; loopback < 2; loopback++) {
        strcpy(request.ifr_name, loopback ? "lo" : "eth0");
        if (ioctl(control, SIOCGIFFLAGS, &request)) fail("read the flags");
        request.ifr_flags |= IFF_UP;
        if (ioctl(control, SIOCSIFFLAGS, &request)) fail("bring the interface up");
    }
    close(control);
}

static void make_host(int i) {
    struct ifreq request = {.ifr_name = "eth0", .ifr_flags = IFF_TUN | IFF_NO_PI};
    if (unshare(CLONE_NEWNET)) fail("make a network namespace");
    host[i].namespace = open("/proc/thread-self/ns/net", O_RDONLY | O_CLOEXEC);
    host[i].tun = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    if (host[i].namespace < 0) fail("open a network namespace");
    if (host[i].tun < 0 || ioctl(host[i].tun, TUNSETIFF, &request)) fail("/dev/net/tun");
    configure(i);
    host[i].up = true;
    for (int j = 0; j < hosts; j++) pair[i][j].delay_ns = pair[i][j].loss = pair[i][j].rate_mbit = NAN;
}

static bool in_the_lab(const char *process) {
    char path[64];
    struct stat theirs, ours;
    snprintf(path, sizeof path, "/proc/%.20s/ns/net", process);
    if (stat(path, &theirs)) return false;
    for (int i = 0; i < hosts; i++)
        if (!fstat(host[i].namespace, &ours) && ours.st_ino == theirs.st_ino && ours.st_dev == theirs.st_dev) return true;
    return false;
}

/* Kills what runs in the hosts, again until a look finds nobody: who was found may just have forked. */
static void kill_all(void) {
    for (int round = 0, found = 1; found && round < 1000; round++) {
        DIR *processes = opendir("/proc");
        found = 0;
        for (struct dirent *entry; processes && (entry = readdir(processes));) {
            int process = atoi(entry->d_name);
            if (process <= 0 || process == getpid() || process == getppid() || !in_the_lab(entry->d_name)) continue;
            kill(process, SIGKILL);
            found = 1;
        }
        if (processes) closedir(processes);
        if (found) nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    }
}

int main(int count, char **arguments) {
    hosts = count > 1 ? atoi(arguments[1]) : 0;
    if (hosts < 1 || hosts > MAX_HOSTS) {
        printf("error a lab has 1 to %d hosts\n", MAX_HOSTS);
        return 1;
    }
    /* Only the end of the input ends the hub: Ctrl-C reaches everything in a terminal, and the hub must be last. */
    signal(SIGINT, SIG_IGN);
    signal(SIGPIPE, SIG_IGN);
    setvbuf(stdout, NULL, _IOLBF, 0);
    prctl(PR_SET_TIMERSLACK, 1);
    int home = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
    int events = epoll_create1(EPOLL_CLOEXEC), timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    struct epoll_event event = {.events = EPOLLIN};
    if (home < 0 || events < 0 || timer < 0) fail("start");
    for (int i = 0; i < hosts; i++) {
        make_host(i);
        event.data.u32 = i;
        if (epoll_ctl(events, EPOLL_CTL_ADD, host[i].tun, &event)) fail("watch a host");
    }
    if (setns(home, CLONE_NEWNET)) fail("return");
    fcntl(STDIN_FILENO, F_SETFL, fcntl(STDIN_FILENO, F_GETFL) | O_NONBLOCK);
    event.data.u32 = TIMER;
    epoll_ctl(events, EPOLL_CTL_ADD, timer, &event);
    event.data.u32 = COMMANDS;
    if (epoll_ctl(events, EPOLL_CTL_ADD, STDIN_FILENO, &event)) fail("watch the input");
    /* With real-time priority packets are on time however busy the machine is. */
    bool realtime = !sched_setscheduler(0, SCHED_FIFO, &(struct sched_param){.sched_priority = 5});
    mlockall(MCL_CURRENT | MCL_FUTURE);
    srand48(1);
    printf("ready %d", realtime);
    for (int i = 0; i < hosts; i++) printf(" %d", host[i].namespace);
    printf("\n");

    unsigned char bytes[MAX_PACKET];
    for (bool open = true; open;) {
        deliver_due();
        struct itimerspec alarm = {0};
        if (under_way) {
            alarm.it_value.tv_sec = heap[0].due / 1000000000;
            alarm.it_value.tv_nsec = heap[0].due % 1000000000;
        }
        timerfd_settime(timer, TFD_TIMER_ABSTIME, &alarm, NULL);
        struct epoll_event ready[16];
        int many = epoll_wait(events, ready, 16, -1);
        for (int i = 0; i < many; i++) {
            unsigned source = ready[i].data.u32;
            uint64_t expirations;
            if (source == TIMER) {
                if (read(timer, &expirations, sizeof expirations) < 0 && errno != EAGAIN) fail("timer");
            } else if (source == COMMANDS) {
                open = read_commands();
            } else {
                ssize_t length;
                for (int k = 0; k < BURST && (length = read(host[source].tun, bytes, sizeof bytes)) > 0; k++)
                    send_packet(source, bytes, length);
            }
        }
    }
    kill_all();
    return 0;
}
