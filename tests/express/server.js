// An application as restcast's users have one: Express, express-session, connect-redis. tests/express.rs starts it, signs in
// and out through it, and watches by the cookies that it sets. Its sessions are made by those packages alone.
import { RedisStore } from "connect-redis";
import express from "express";
import session from "express-session";
import { createClient } from "redis";

const { REDIS_URL, SECRETS, MAX_AGE_MS, ROLLING, UNINITIALIZED, PREFIX } = process.env;
const client = createClient({ url: REDIS_URL });
client.on("error", (error) => console.error(error.message));
await client.connect();

const app = express();
app.use(
  session({
    store: new RedisStore({ client, ...(PREFIX ? { prefix: PREFIX } : {}) }),
    secret: SECRETS.split(","),
    resave: false,
    rolling: ROLLING === "true",
    saveUninitialized: UNINITIALIZED === "true",
    cookie: { maxAge: MAX_AGE_MS ? Number(MAX_AGE_MS) : undefined, httpOnly: true, sameSite: "lax" },
  }),
);

const list = (text) => (text ? String(text).split(",") : []);
const done = (response) => (error) => response.status(error ? 500 : 200).json({ error: error?.message });

// A session of its own for whoever signs in, as one does against fixation.
app.post("/login", (request, response) => {
  request.session.regenerate((error) => {
    if (error) return done(response)(error);
    const { user, role, company, permissions } = request.query;
    request.session.userId = /^[0-9]+$/.test(user) ? Number(user) : user;
    request.session.userRole = role;
    request.session.companyId = company;
    request.session.permissions = list(permissions);
    request.session.save(done(response));
  });
});

// express-session saves what has changed when the answer ends, and moves `cookie.expires` with it.
app.post("/permissions", (request, response) => {
  request.session.permissions = list(request.query.permissions);
  response.json({});
});

// Whoever is only signed out keeps the session, for its shopping basket.
app.post("/forget", (request, response) => {
  delete request.session.userId;
  request.session.save(done(response));
});

app.post("/logout", (request, response) => request.session.destroy(done(response)));

app.get("/me", (request, response) => response.json({ user: request.session.userId ?? null }));

const server = app.listen(0, "127.0.0.1", () => console.log(JSON.stringify({ port: server.address().port })));
