/* Accept one connection and put it into a free slot: what Runtime.accept does in one call.
 *
 * CRASH: before the slot is LIVE the kernel ends the connection; after, see Runtime.create_socket.
 */
#ifndef SHMSOCK_ACCEPTING_H
#define SHMSOCK_ACCEPTING_H

#include <Python.h>

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "_transitions.h"

#define PEER_ROOM (INET6_ADDRSTRLEN + 16)

/* Who is at the other end, as peer_of in descriptors.py says it; 0: a case for that. */
static size_t
peer_text(const struct sockaddr_storage *address, socklen_t length, char *text)
{
    char host[INET6_ADDRSTRLEN];
    if (address->ss_family == AF_INET) {
        const struct sockaddr_in *in = (const struct sockaddr_in *)address;
        if (inet_ntop(AF_INET, &in->sin_addr, host, sizeof host) == NULL)
            return 0;
        PyOS_snprintf(text, PEER_ROOM, "%s:%u", host, ntohs(in->sin_port));
    }
    else if (address->ss_family == AF_INET6) {
        const struct sockaddr_in6 *in6 = (const struct sockaddr_in6 *)address;
        if (inet_ntop(AF_INET6, &in6->sin6_addr, host, sizeof host) == NULL)
            return 0;
        PyOS_snprintf(text, PEER_ROOM, "[%s]:%u", host, ntohs(in6->sin6_port));
    }
    else if (address->ss_family == AF_UNIX && length <= offsetof(struct sockaddr_un, sun_path))
        strcpy(text, "unix:-");
    else
        return 0;
    return strlen(text);
}

/* accept(listener, owner, on_owner_death, tcp, unix, made): (number, inode, id), the id 0 if the table
 * is full: the number is the caller's in any case. `made` gets the same before we return: an exception
 * may come before the caller's next line. tcp and unix are the numbers of these kinds. */
static PyObject *
Engine_accept(Engine *self, PyObject *args)
{
    int listener;
    unsigned long long owner;
    unsigned char fate, tcp, local;
    PyObject *list;
    if (!PyArg_ParseTuple(args, "iKbbbO!", &listener, &owner, &fate, &tcp, &local, &PyList_Type,
                          &list))
        return NULL;
    if ((self->closed || self->foreign) && check_participation(self) < 0)
        return NULL; /* before anybody is taken out of the backlog */
    struct sockaddr_storage address = {0};
    socklen_t length = sizeof address;
    int number, code;
    Py_BEGIN_ALLOW_THREADS /* a listener may be a blocking one */
    number = accept4(listener, (struct sockaddr *)&address, &length, SOCK_CLOEXEC);
    code = errno;
    Py_END_ALLOW_THREADS
    if (number < 0) {
        errno = code;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    char text[PEER_ROOM];
    struct stat status;
    PyObject *peer = NULL, *made = NULL;
    Call call = {.new = {.owner = owner, .on_owner_death = fate, .user_data = ""}};
    call.new.kind = address.ss_family == AF_UNIX ? local : tcp;
    call.new.peer = text;
    call.new.peer_bytes = peer_text(&address, length, text);
    if (fstat(number, &status) < 0) {
        PyErr_SetFromErrno(PyExc_OSError);
        goto failed;
    }
    call.new.inode = status.st_ino;
    if (!call.new.peer_bytes) {
        char *bytes;
        Py_ssize_t size;
        peer = PyObject_CallMethod(OBJECT(self), "_peer_of", "i", number);
        if (peer == NULL || PyBytes_AsStringAndSize(peer, &bytes, &size) < 0)
            goto failed;
        call.new.peer = bytes;
        call.new.peer_bytes = (size_t)size;
    }
    int result = create_anywhere(self, &call);
    if (result == RAISED)
        goto failed;
    made = Py_BuildValue("iKK", number, (unsigned long long)status.st_ino,
                         (unsigned long long)(result == DONE ? call.made : 0));
    if (made != NULL && PyList_Append(list, made) < 0)
        Py_CLEAR(made);
    if (made == NULL && result == DONE)
        end_unknown(self, call.made);
failed:
    Py_XDECREF(peer);
    if (made == NULL)
        close(number);
    return made;
}

#endif
