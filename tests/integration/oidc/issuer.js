// An OIDC issuer that we have not written, for tests: oidc-provider with its own pages for logging in and consenting.
//
//   node issuer.js FOLDER_OF_NODE_MODULES
//
// Whoever logs in is who they say, with any password. Listens on a free port of the loopback; prints READY and its URL.
import { createServer } from 'node:http'
import { createRequire } from 'node:module'
import { pathToFileURL } from 'node:url'
import { join } from 'node:path'

const modules = process.argv[2]
const path = createRequire(join(modules, 'index.js')).resolve('oidc-provider')
const { Provider } = await import(pathToFileURL(path).href)
const lifetime = Number(process.env.TOKEN_SECONDS ?? 3600)

const server = createServer()
server.listen(0, '127.0.0.1', () => {
  const issuer = `http://127.0.0.1:${server.address().port}`
  const provider = new Provider(issuer, {
    clients: [{
      client_id: 'ferryline-cli',
      application_type: 'native',
      token_endpoint_auth_method: 'none',
      redirect_uris: ['http://127.0.0.1/callback'],
      response_types: ['code'],
      grant_types: ['authorization_code', 'refresh_token', 'urn:ietf:params:oauth:grant-type:device_code'],
    }],
    scopes: ['openid', 'offline_access', 'email', 'groups', 'messages'],
    claims: { openid: ['sub'], email: ['email', 'email_verified'], groups: ['groups'] },
    conformIdTokenClaims: false,
    findAccount: (ctx, id) => ({
      accountId: id,
      claims: () => ({
        sub: id,
        email: `${id}@example.org`,
        email_verified: true,
        groups: id === 'ann' ? ['packers', 'readers'] : ['readers'],
      }),
    }),
    features: {
      deviceFlow: { enabled: true },
      devInteractions: { enabled: true },
      revocation: { enabled: true },
      resourceIndicators: {
        enabled: true,
        useGrantedResource: () => true,
        getResourceServerInfo: (ctx, resource) => ({
          audience: resource,
          scope: 'messages',
          accessTokenFormat: 'jwt',
          accessTokenTTL: lifetime,
          jwt: { sign: { alg: 'RS256' } },
        }),
      },
    },
    extraTokenClaims: (ctx, token) => ({ groups: token.accountId === 'ann' ? ['packers'] : [] }),
    ttl: { IdToken: lifetime, AccessToken: lifetime },
  })
  server.on('request', provider.callback())
  process.stdout.write(`READY ${JSON.stringify({ issuer })}\n`)
})
process.on('SIGTERM', () => process.exit(0))
